"""Values at shared places, added up without decoding: the bits of one phase, a volume that does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, all_reduce_cost, all_reduce_many_, choose_algorithm
from gck.errors import ArgumentError
from tests.cases import same_bytes


def reduced(
    compressor: Any, world_size: int, numels: tuple[int, ...], feedback: bool, algorithm: str
) -> list[Any]:
    """Of every rank: results and residuals after two steps with gradients that have zeros of both signs."""

    def rank_main(member: Any) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(member.rank)
        states = [gck.ErrorFeedback() if feedback else None for _ in numels]
        for _ in range(2):
            grads = [torch.randn(n, generator=generator) for n in numels]
            for grad in grads:
                grad[::5] = -0.0
            all_reduce_many_(grads, states, compressor, member, algorithm=algorithm)
        return grads, [state.worker for state in states if state is not None and state.worker is not None]

    return SimulatedGroup(world_size).run(rank_main)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_one_phase(value_dtype: torch.dtype, world_size: int, feedback: bool) -> None:
    compressor = gck.RandomK(ratio=0.1, seed=5, value_dtype=value_dtype)
    numels = (1, 7, 1003, 4099)
    ours = reduced(compressor, world_size, numels, feedback, "seeded")
    wanted = reduced(compressor, world_size, numels, feedback, "one_phase")
    for rank in range(world_size):
        for tensors, others in zip(ours[rank], wanted[rank], strict=True):
            assert len(tensors) == len(others)
            assert all(same_bytes(one, other) for one, other in zip(tensors, others, strict=True))


def test_ranks_that_share_what_they_gather_do_not_share_results() -> None:
    def rank_main(member: Any) -> Tensor:
        grad = torch.full((1280,), 1.0 + member.rank)
        # 32 values a part: messages without padding, which need not be put together from pieces.
        return gck.all_reduce_(
            grad, gck.ErrorFeedback(), gck.RandomK(k=128, seed=0), member, algorithm="seeded"
        )

    for result in SimulatedGroup(4, shared_gathers=True).run(rank_main):
        assert sorted(set(result.tolist())) == [0.0, 2.5]


def test_what_is_not_finite_arrives() -> None:
    def rank_main(member: Any) -> Tensor:
        grad = torch.full((64,), float("inf") if member.rank == 1 else 1.0)
        return gck.all_reduce_(
            grad, gck.ErrorFeedback(), gck.RandomK(k=64, seed=0), member, algorithm="seeded"
        )

    for result in SimulatedGroup(3).run(rank_main):
        assert bool(result.isinf().all())


def test_it_is_for_shared_places_alone() -> None:
    def rank_main(member: Any) -> str:
        with pytest.raises(
            ArgumentError, match='"seeded" needs ranks that choose the same entries'
        ) as raised:
            gck.all_reduce_(torch.ones(64), None, gck.TopK(k=2), member, algorithm="seeded")
        return str(raised.value)

    assert "TopK" in SimulatedGroup(2).run(rank_main)[0]
    with pytest.raises(ArgumentError, match="not for"):
        all_reduce_cost(gck.Sign(), [64], 2, "seeded")


def test_the_volume_does_not_grow_with_the_world() -> None:
    compressor, numel = gck.RandomK(ratio=0.01, seed=0), 1 << 20
    assert choose_algorithm(compressor, [numel], 2) == "one_phase"
    for world_size in (3, 16, 64):
        assert choose_algorithm(compressor, [numel], world_size) == "seeded"
    sent = [all_reduce_cost(compressor, [numel], w, "seeded").nbytes for w in (16, 64)]
    assert sent[1] < 1.1 * sent[0] < 1.1 * 8 * compressor.layout(numel).fields[0].count
