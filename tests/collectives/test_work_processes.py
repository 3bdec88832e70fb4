"""Asynchronous collectives between processes; their results are compared by test_processes.py."""

from __future__ import annotations

from pathlib import Path

from tests.collectives.launcher import run_ranks


def test_a_lost_peer_ends_all_that_is_in_flight(tmp_path: Path) -> None:
    report = run_ranks("tests.collectives.work_worker", 2, tmp_path, "lost", lost=(1,))[0]
    assert report["errors"] == ["PeerLostError"] + ["GroupUnusableError"] * 3
    assert report["seconds"] < 10  # the group's timeout is 60
    assert report["unchanged"]


def test_exit_with_work_in_flight(tmp_path: Path) -> None:
    assert run_ranks("tests.collectives.work_worker", 2, tmp_path, "exit") == [[True] * 4] * 2
    for rank in range(2):
        # Nothing, or that a peer was faster: no crash.
        log = (tmp_path / f"{rank}.log").read_text()
        assert "terminate" not in log
        assert "Fatal" not in log
        assert "Traceback" not in log
