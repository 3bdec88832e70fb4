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
from tests.nccl.ranks import assert_refused

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("nccl")]


@pytest.fixture(autouse=True)
def no_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fake_nccl" in os.environ.get("GCK_NCCL_LIBRARY", ""):
        monkeypatch.delenv("GCK_NCCL_LIBRARY")


OWN = ["own"]  # a GPU for each rank


def of_ranks(world_size: int) -> list[str]:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    return OWN


def right_hosts(directory: Path, rank: int, own: bool) -> bool:
    """Whether all ranks took themselves for one host where each has a GPU, and else for hosts of their own:
    NCCL refuses to share a GPU otherwise."""
    text = "".join(path.read_text(errors="replace") for path in directory.glob(f"nccl.{rank}.log*"))
    sizes = [line for line in text.splitlines() if " nNodes " in line]
    counts = [(line.split(" nRanks ")[1].split()[0], line.split(" nNodes ")[1].split()[0]) for line in sizes]
    return bool(counts) and all(nodes == ("1" if own else ranks) for ranks, nodes in counts)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_same_bytes_as_simulated_ranks(world_size: int, own: bool, tmp_path: Path) -> None:
    gpus = of_ranks(world_size) if own else []
    reports = launcher.run_ranks(
        "tests.nccl.gpu_worker", world_size, tmp_path, "collectives", *gpus, timeout=240
    )

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
        assert right_hosts(tmp_path, rank, own)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_a_killed_rank(own: bool, tmp_path: Path) -> None:
    gpus = of_ranks(3) if own else []
    reports = launcher.run_ranks("tests.nccl.gpu_worker", 3, tmp_path, "kill", *gpus, timeout=240, lost=(2,))
    for report in reports[:2]:
        assert report["error"] in ("PeerLostError", "CollectiveTimeoutError"), report
        assert report["seconds"] < KILL_TIMEOUT + 2, report
        assert report["unchanged"]
        assert "the group cannot be used any more" in report["after"]


def test_two_that_do_not_belong_together(tmp_path: Path) -> None:
    reports = launcher.run_ranks("tests.nccl.stranger_worker", 2, tmp_path, "10", "real", timeout=240)
    assert_refused(reports, timeout=10, late=4)
