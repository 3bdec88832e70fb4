"""Residuals of factored all-reduces, which change when nothing can fail any more: no copies, and Ctrl-C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import HierarchicalGroup, SimulatedGroup, all_reduce_many_
from gck.collectives.measured import Measured
from gck.collectives.undo import Kept
from gck.errors import (
    AutogradError,
    DtypeError,
    GckError,
    GroupUnusableError,
    LayoutError,
    ShapeMismatchError,
)
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
    [
        ((Matrices, "settle_"), torch.float32),
        ((Matrices, "settle_"), torch.bfloat16),
        ((Matrices, "product_"), torch.float32),
        ((Measured, "end"), torch.float32),  # when counters and bases are there
    ],
    ids=str,
)
def test_ctrl_c_finds_everything_written_once(
    late: tuple[Any, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = SimulatedGroup(1).members[0]
    states, twins = ([gck.ErrorFeedback() for _ in SHAPES] for _ in range(2))
    for each in (states, twins):
        step(member, list(each), 1)
    wanted = step(member, list(twins), 2, dtype)
    works, interrupts = getattr(*late), [KeyboardInterrupt, KeyboardInterrupt]

    def interrupted(*args: Any) -> None:
        works(*args)
        if interrupts:
            raise interrupts.pop()

    grads = gradients(2, dtype)
    monkeypatch.setattr(*late, interrupted)
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


def test_what_is_as_large_as_a_gradient_begins_at_a_cache_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the caches only whole lines are written."""
    works, places = Matrices.project_, list[int]()

    def watched(self: Matrices, *given: Any) -> None:
        places.extend(acc.data_ptr() for acc in given[3])
        works(self, *given)

    monkeypatch.setattr(Matrices, "project_", watched)
    step(SimulatedGroup(1).members[0], [gck.ErrorFeedback() for _ in SHAPES], 1)
    assert len(places) == 4
    assert all(place % 64 == 0 for place in places)


def frozen() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(1, dtype=torch.int64)


COUNTERS: list[tuple[Any, type[GckError]]] = [
    (frozen, AutogradError),
    (lambda: torch.zeros(2, dtype=torch.int64), ShapeMismatchError),
    (lambda: torch.zeros(1, dtype=torch.int32), DtypeError),
    (lambda: torch.zeros(1), DtypeError),
]


@pytest.mark.parametrize("algorithm", ["factored", "dense"])
@pytest.mark.parametrize(("counter", "error"), COUNTERS)
def test_counters_that_cannot_count(counter: Any, error: type[GckError], algorithm: str) -> None:
    """Refused before anything is written, or known to peers."""
    member, grad, state = SimulatedGroup(1).members[0], torch.randn(30, 20), gck.ErrorFeedback()
    gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm="factored")
    assert state.worker is not None
    state.nonfinite = counter()
    copies = grad.clone(), state.worker.clone()
    with pytest.raises(error, match="all_reduce_: nonfinite "):
        gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm=algorithm)
    assert same_bytes(grad, copies[0])
    assert same_bytes(state.worker, copies[1])
    state.nonfinite = torch.zeros((), dtype=torch.int64)
    gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm=algorithm)


def test_two_states_do_not_share_a_counter() -> None:
    member, states = SimulatedGroup(1).members[0], [gck.ErrorFeedback(), gck.ErrorFeedback()]
    states[0].nonfinite = states[1].nonfinite = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(LayoutError, match="the counter of grads"):
        all_reduce_many_([torch.ones(30, 20), torch.ones(9, 9)], states, LowRank(), member)


def test_a_gradient_that_is_negated_lazily_is_refused() -> None:
    member, grad = SimulatedGroup(1).members[0], torch.ones(30, 20)
    with pytest.raises(LayoutError, match="negated lazily"):
        gck.all_reduce_(torch._neg_view(grad), None, LowRank(rank=2), member, algorithm="factored")
    assert bool((grad == 1).all())
