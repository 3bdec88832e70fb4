"""A group that is given up, over gloo, while an exchange of large messages is under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.collectives.launcher import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("exchange", [("gather",), ("swap",), ("gather", "by default")], ids="-".join)
def test_a_wait_ends_here_and_at_peers(exchange: tuple[str, ...], tmp_path: Path) -> None:
    here, there = run_ranks("tests.collectives.given_up_worker", 2, tmp_path, *exchange)
    assert (here["error"], there["error"]) == ("GroupUnusableError", "PeerLostError")
    assert max(here["seconds"], there["seconds"]) < 10  # the group's timeout is 60
    # Where nobody held what was asked for, gloo's thread would be busy for ever with what comes.
    assert here["busy"] < 0.5


def test_ranks_that_fail_end(tmp_path: Path) -> None:
    """They do not wait for the group's timeout, 60 s: each for messages that no other will pass on."""
    results = run_ranks("tests.collectives.given_up_worker", 3, tmp_path, "fail", timeout=30)
    errors = {result["error"] for result in results}
    assert "MemoryError" in errors
    assert errors <= {"MemoryError", "PeerLostError"}  # of one that waits as the first fails
    assert max(result["seconds"] for result in results) < 10


@pytest.mark.parametrize("when", ["early", "first"])
def test_a_rank_that_cannot_compress_what_peers_wait_for(when: str, tmp_path: Path) -> None:
    """Peers hear of it at once: what it has asked for would else be taken for that of the next call."""
    results = run_ranks("tests.collectives.given_up_worker", 3, tmp_path, "fail", when, timeout=30)
    assert [result["error"] for result in results] == ["MemoryError", "PeerLostError", "PeerLostError"]
    for result in results:
        assert result["seconds"] < 10  # the group's timeout is 60
        assert result["unchanged"]
        assert result["after"] == "GroupUnusableError"


@pytest.mark.parametrize(("numel", "piece_numel"), [(1000, 0), (4_000_000, 0), (8_000_000, 2_000_000)])
def test_a_survivor_ends_while_its_peer_is_stopped(numel: int, piece_numel: int, tmp_path: Path) -> None:
    """As a whole process, with what gloo does at its end."""
    argv = [sys.executable, "-m", "tests.collectives.stopped_worker", tmp_path, str(numel), str(piece_numel)]
    common = os.environ | {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen(argv, cwd=ROOT, env=common | {"RANK": str(rank)}) for rank in (0, 1)]
    try:
        assert ranks[0].wait(40) == 0  # the group's timeout is 60
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert json.loads((tmp_path / "0.json").read_text()) == "CollectiveTimeoutError"
