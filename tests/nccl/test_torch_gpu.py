"""torch's own NCCL under gck's collectives and under DDP: two ranks, on one GPU where there is but one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gck.collectives import SimulatedGroup
from tests.collectives import launcher, scenarios
from tests.nccl.gpu_worker import on_device

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("torch nccl")]
CHECKS = [
    "check_checksums",
    "check_ddp_overlap_makes_no_difference",
    "check_a_step_that_the_scaler_skips",
    "check_residuals_of_unused_parameters_stay",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launcher.run_ranks("tests.nccl.torch_worker", 2, tmp_path_factory.mktemp("torch"), timeout=200)


def test_collectives_have_the_bytes_of_simulated_ranks(reports: list[dict[str, Any]]) -> None:
    def rank_main(member: Any) -> tuple[Any, Any]:
        small = scenarios.run(member.rank, 2, member)
        return small, on_device(member.rank, member, torch.device("cpu"))

    for rank, (small, large) in enumerate(SimulatedGroup(2, timeout=120).run(rank_main)):
        found = reports[rank]["check_collectives"]
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert {name: tuple(digests) for name, digests in found["scenarios"].items()} == small
        assert found["on_device"] == large
        assert found["in_flight"] == large


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, reports: list[dict[str, Any]]) -> None:
    launcher.assert_passed(check, reports)
