"""The real library on a GPU, with as many processes on it as ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gck.collectives import SimulatedGroup
from tests.collectives import launcher, scenarios
from tests.nccl.gpu_worker import KILL_TIMEOUT, on_device

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("nccl")]


@pytest.fixture(autouse=True)
def no_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fake_nccl" in os.environ.get("GCK_NCCL_LIBRARY", ""):
        monkeypatch.delenv("GCK_NCCL_LIBRARY")


def emulated_nodes(directory: Path, rank: int) -> bool:
    """Whether ranks took themselves for hosts of their own: else NCCL refuses to share a GPU."""
    text = "".join(path.read_text(errors="replace") for path in directory.glob(f"nccl.{rank}.log*"))
    sizes = [line for line in text.splitlines() if " nNodes " in line]
    return bool(sizes) and all(
        line.split(" nRanks ")[1].split()[0] == line.split(" nNodes ")[1].split()[0] for line in sizes
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_bytes_as_simulated_ranks(world_size: int, tmp_path: Path) -> None:
    reports = launcher.run_ranks("tests.nccl.gpu_worker", world_size, tmp_path, "collectives", timeout=240)

    def rank_main(member: Any) -> tuple[Any, Any]:
        small = scenarios.run(member.rank, world_size, member)
        return small, on_device(member.rank, member, torch.device("cpu"))

    for rank, (small, large) in enumerate(SimulatedGroup(world_size, timeout=120).run(rank_main)):
        report = reports[rank]
        assert {name: tuple(found) for name, found in report["scenarios"].items()} == small
        assert report["on_device"] == large
        assert report["on_device_of_the_other"] == large
        assert report["in_flight"] == large
        assert len(report["libraries"]) == 1, report["libraries"]
        assert emulated_nodes(tmp_path, rank)


def test_a_killed_rank(tmp_path: Path) -> None:
    reports = launcher.run_ranks("tests.nccl.gpu_worker", 3, tmp_path, "kill", timeout=240, lost=(2,))
    for report in reports[:2]:
        assert report["error"] in ("PeerLostError", "CollectiveTimeoutError"), report
        assert report["seconds"] < KILL_TIMEOUT + 2, report
        assert report["unchanged"]
        assert "the group cannot be used any more" in report["after"]
