"""A rank that never comes: to a collective, or to the group. And Ctrl-C of those who wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.collectives.launcher import run_ranks

WORLD_SIZE = 3
TIMEOUT = 1.0
NUMEL = 100_000
LOST = {"CollectiveTimeoutError", "PeerLostError"}
pytestmark = pytest.mark.xdist_group("absent")  # one run for all


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("absent")
    return run_ranks("tests.collectives.absent_worker", WORLD_SIZE, directory)


@pytest.mark.parametrize("name", ["handshake", "rounds", "dense"])
def test_a_rank_that_does_not_call(name: str, reports: list[dict[str, Any]]) -> None:
    for report in reports[:2]:
        result = report[name]
        assert result["error"] in LOST, result
        assert result["seconds"] < TIMEOUT + 2, result
        assert result["unchanged"], result
        assert result["after"]["error"] == "GroupUnusableError", result


def test_a_rank_that_never_joins(tmp_path: Path) -> None:
    for report in run_ranks("tests.collectives.absent_worker", WORLD_SIZE - 1, tmp_path, "alone"):
        for name, timeout in (("one", TIMEOUT), ("another", 2 * TIMEOUT)):
            assert "timeout" in report[name]["text"].lower()
            assert timeout - 0.1 < report[name]["seconds"] < timeout + 3  # torch counts whole seconds


def test_a_rank_that_does_not_come_to_a_new_group(reports: list[dict[str, Any]]) -> None:
    for report in reports[:2]:
        assert report["split"]["error"] in LOST, report["split"]
        assert report["split"]["seconds"] < TIMEOUT + 2, report["split"]


@pytest.mark.parametrize("name", ["Ctrl-C in the handshake", "Ctrl-C in rounds", "Ctrl-C in a dense one"])
def test_an_interrupt_ends_a_wait(name: str, reports: list[dict[str, Any]]) -> None:
    for report in reports[:2]:
        result = report[name]
        assert result["error"] == "KeyboardInterrupt", result
        assert result["seconds"] < 10, result  # of 60
        assert result["unchanged"], result
        assert result["after"]["error"] == "GroupUnusableError", result


def test_a_group_that_is_destroyed_while_bytes_are_under_way(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        result = report["destroyed"]
        assert result.get("right") or result["error"] in {*LOST, "GroupUnusableError"}, result
