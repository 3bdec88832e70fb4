"""Residuals of factored all-reduces, which change when nothing can fail any more: no copies, and Ctrl-C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import HierarchicalGroup, SimulatedGroup, all_reduce_many_
from gck.collectives.undo import Kept
from gck.errors import GroupUnusableError
from gck.kernels.low_rank import LowRank
from gck.kernels.low_rank.matrices import Matrices
from tests.cases import same_bytes

SHAPES = [(30, 20), (0, 4), (30, 20), (12, 50), (7,)]
State = gck.ErrorFeedback | None


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads[2][3, 4] = float("inf")  # which is cleared, and counted
    return [grad.to(dtype) for grad in grads]


def step(member: Any, states: list[State], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    grads = gradients(seed, dtype)
    all_reduce_many_(grads, states, LowRank(rank=2), member, algorithm="factored")
    return grads


def kept(states: list[State]) -> list[Any]:
    return [(s.worker, s.basis, s.nonfinite) for s in states if s is not None]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    return all(a is b is None or same_bytes(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("late", "dtype"),
    [("settle_", torch.float32), ("settle_", torch.bfloat16), ("product_", torch.float32)],
    ids=str,
)
def test_ctrl_c_finds_everything_written_once(
    late: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = SimulatedGroup(1).members[0]
    states, twins = ([gck.ErrorFeedback() for _ in SHAPES] for _ in range(2))
    for each in (states, twins):
        step(member, list(each), 1)
    wanted = step(member, list(twins), 2, dtype)
    works, interrupts = getattr(Matrices, late), [KeyboardInterrupt, KeyboardInterrupt]

    def interrupted(*args: Any) -> None:
        works(*args)
        if interrupts:
            raise interrupts.pop()

    grads = gradients(2, dtype)
    monkeypatch.setattr(Matrices, late, interrupted)
    with pytest.raises(KeyboardInterrupt):
        all_reduce_many_(grads, states, LowRank(rank=2), member, algorithm="factored")
    assert not interrupts
    assert all(map(same_bytes, grads, wanted))
    assert same(kept(list(states)), kept(list(twins)))
    assert states[2].nonfinite is not None
    assert int(states[2].nonfinite) > 0
    step(member, list(states), 3)  # the group goes on


def test_an_error_at_the_end_gives_the_group_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Want of memory: gradients may be half written, and residuals."""

    def failing(*_: Any) -> None:
        raise MemoryError

    member = SimulatedGroup(1).members[0]
    monkeypatch.setattr(Matrices, "settle_", failing)
    with pytest.raises(MemoryError):
        step(member, [gck.ErrorFeedback() for _ in SHAPES], 1)
    with pytest.raises(GroupUnusableError, match="MemoryError in all_reduce_many_"):
        gck.all_reduce_(torch.ones(64), None, gck.Sign(), member)


@pytest.mark.parametrize("local", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residuals_are_not_copied(local: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def rank_main(member: Any) -> None:
        group = HierarchicalGroup.from_group(member, local_world_size=local) if local else member
        states: list[State] = [gck.ErrorFeedback() for _ in SHAPES]
        for seed in range(3):
            step(group, states, seed + member.rank, dtype)

    def refused(*_: Any) -> None:
        raise AssertionError("a residual is copied")

    monkeypatch.setattr(Kept, "keep", refused)
    SimulatedGroup(4).run(rank_main)


def test_tensors_with_and_without_a_state_share_a_call() -> None:
    def rank_main(member: Any) -> tuple[list[Tensor], list[Any], list[Tensor], list[Any]]:
        some: list[State] = [gck.ErrorFeedback(), None, gck.ErrorFeedback(), None, gck.ErrorFeedback()]
        every: list[State] = [gck.ErrorFeedback() for _ in SHAPES]
        got, wanted = step(member, some, member.rank), step(member, every, member.rank)
        return got, kept(some), wanted, kept([every[i] for i in (0, 2, 4)])

    for got, states, wanted, twins in SimulatedGroup(2).run(rank_main):
        assert all(map(same_bytes, got, wanted))  # the first step, whose residuals are zeros
        assert same(states, twins)
