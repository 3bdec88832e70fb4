"""The FSDP hook over torch's own NCCL: two replicas of two ranks, on one GPU where there is but one."""

from __future__ import annotations

import pytest

from tests.collectives import launcher
from tests.collectives.fsdp_worker import CHECKS

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("torch nccl")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    directory = tmp_path_factory.mktemp("fsdp")
    return launcher.run_ranks("tests.collectives.fsdp_worker", 4, directory, "cuda", timeout=280)


@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(check: str, reports: list[dict[str, str]]) -> None:
    launcher.assert_passed(check, reports)
