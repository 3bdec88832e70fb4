"""The FSDP hook: on four real ranks (collectives/fsdp_worker.py), and what needs none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import BackendUnavailableError, CollectiveMismatchError, DtypeError
from gck.integrations import replicas
from gck.integrations.replicas import check_replicas
from tests.collectives.fsdp_worker import CHECKS
from tests.collectives.launcher import assert_passed, run_ranks
from tests.versions import needs_fsdp_hook


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks("tests.collectives.fsdp_worker", 4, tmp_path_factory.mktemp("fsdp"), timeout=200)


@needs_fsdp_hook
@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks(check: str, reports: list[dict[str, str]]) -> None:
    assert_passed(check, reports)


@needs_fsdp_hook
def test_a_model_that_is_not_sharded() -> None:
    with pytest.raises(DtypeError, match=r"gck.fsdp.register: model must be sharded by fully_shard, got "):
        gck.fsdp.register(nn.Linear(3, 3), gck.Sign(), None)


def test_a_torch_without_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.fsdp

    monkeypatch.delattr(torch.distributed.fsdp.FSDPModule, "set_all_reduce_hook", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"has no FSDPModule.set_all_reduce_hook"):
        gck.fsdp.register(nn.Linear(3, 3), gck.Sign(), None)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool]
)
@pytest.mark.parametrize("differs", [None, 0, 2])
def test_replicas(dtype: torch.dtype, differs: int | None) -> None:
    """One element of one rank, or its place; of strided tensors, empty ones and numbers alike."""

    def rank_main(member: SimulatedMember) -> str:
        tensors: dict[str, Any] = {
            "a": torch.zeros(0, dtype=dtype),
            "b": torch.ones(7, 9).to(dtype)[::2, ::2],
            "c": torch.tensor(1.0).to(dtype),
        }
        tensors["b"][0, 0] = 0
        if member.rank == differs:
            tensors["b"][0, 0], tensors["b"][1, 1] = 1, 0
        try:
            check_replicas("f", member, tensors, [tensor.shape for tensor in tensors.values()])
        except CollectiveMismatchError as error:
            return str(error)
        return "same"

    said = SimulatedGroup(3, timeout=20).run(rank_main)
    other = 1 if differs == 0 else differs
    expected = "same" if differs is None else f"f: b of rank {other} of the group is not that of rank 0"
    assert all(text.startswith(expected) for text in said), said


def test_whatever_the_default_device_is() -> None:
    tensors = {"a": torch.randn(5), "b": torch.zeros(0)}
    with torch.device("meta"):
        check_replicas("f", SimulatedGroup(1).members[0], tensors, ["", ""])


def test_hashes_know_places_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BLOCK", 8)
    tensor = torch.arange(100)
    hashes = {replicas._hash(tensor.roll(shift)) for shift in range(100)}
    assert len(hashes) == 100
    permuted = {replicas._hash(torch.eye(6)[torch.randperm(6)]) for _ in range(50)}
    assert len(permuted) > 40
    assert replicas._hash(torch.tensor([1, 0, 0, 1])) != replicas._hash(torch.tensor([0, 1, 1, 0]))
    assert replicas._hash(tensor.view(10, 10).T) == replicas._hash(tensor.view(10, 10).T.contiguous())
