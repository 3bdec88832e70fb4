"""A rank that never comes: to a collective, or to the group. And Ctrl-C of those who wait for it."""

from __future__ import annotations

from pathlib import Path

from tests.collectives.launcher import run_ranks

WORLD_SIZE = 3
TIMEOUT = 1.0
NUMEL = 100_000
LOST = {"CollectiveTimeoutError", "PeerLostError"}


def test_a_rank_that_does_not_call(tmp_path: Path) -> None:
    """One run for all: those who wait lose it, are interrupted, or destroy the group under way."""
    reports = run_ranks("tests.collectives.absent_worker", WORLD_SIZE, tmp_path)
    for report in reports[:2]:
        for name in ("handshake", "rounds", "dense"):
            result = report[name]
            assert result["error"] in LOST, (name, result)
            assert result["seconds"] < TIMEOUT + 2, (name, result)
            assert result["unchanged"], (name, result)
            assert result["after"]["error"] == "GroupUnusableError", (name, result)
        for name in ("Ctrl-C in the handshake", "Ctrl-C in rounds", "Ctrl-C in a dense one"):
            result = report[name]
            assert result["error"] == "KeyboardInterrupt", (name, result)
            assert result["seconds"] < 10, (name, result)  # of 60
            assert result["unchanged"], (name, result)
            assert result["after"]["error"] == "GroupUnusableError", (name, result)
        assert report["split"]["error"] in LOST, report["split"]
        assert report["split"]["seconds"] < TIMEOUT + 2, report["split"]
    for report in reports:
        result = report["destroyed"]
        assert result.get("right") or result["error"] in {*LOST, "GroupUnusableError"}, result


def test_a_rank_that_never_joins(tmp_path: Path) -> None:
    for report in run_ranks("tests.collectives.absent_worker", WORLD_SIZE - 1, tmp_path, "alone"):
        for name, timeout in (("one", TIMEOUT), ("another", 2 * TIMEOUT)):
            assert "timeout" in report[name]["text"].lower()
            assert timeout - 0.1 < report[name]["seconds"] < timeout + 3  # torch counts whole seconds
