"""Asynchronous collectives between processes; their results are compared by test_processes.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.collectives.launcher import run_ranks

ROOT = Path(__file__).parents[2]


def test_a_lost_peer_ends_all_that_is_in_flight(tmp_path: Path) -> None:
    report = run_ranks("tests.collectives.work_worker", 2, tmp_path, "lost", lost=(1,))[0]
    assert report["errors"] == ["PeerLostError"] + ["GroupUnusableError"] * 3
    assert report["seconds"] < 10  # the group's timeout is 60
    assert report["unchanged"]


def test_exit_with_work_in_flight(tmp_path: Path) -> None:
    assert run_interpreters(tmp_path, "exit") == [[True] * 4] * 2


def test_threads_that_start_at_exit_are_joined(tmp_path: Path) -> None:
    """One that frees a tensor after the interpreter has ended takes the process down."""
    assert run_interpreters(tmp_path, "late") == [["MainThread"]] * 2


def run_interpreters(tmp_path: Path, mode: str) -> list[Any]:
    """What two ranks report, each an interpreter of its own, which ends as usual."""
    environment = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.collectives.work_worker", str(tmp_path), mode],
            env=environment | {"RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            said = process.communicate(timeout=90)[1]
            assert process.returncode == 0, said
            # Nothing, or that its peer was gone first; no crash.
            assert not any(word in said for word in ("terminate", "Fatal", "Traceback")), said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
