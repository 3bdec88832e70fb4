"""Steps with something that is not finite: all ranks see it, none has to ask, residuals are put back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_, all_reduce_many_
from gck.nonfinite import StepGuard, any_nonfinite
from tests.cases import same_bytes

NUMELS = {"a": 700, "b": 64, "c": 5}
CASES = [
    (gck.TopK(ratio=0.1), "one_phase"),
    (gck.TopK(ratio=0.1, value_dtype=torch.float16), "one_phase"),
    (gck.RandomK(ratio=0.05, seed=0), "one_phase"),
    (gck.Sign(32), "two_phase"),
    (gck.ChunkTopK(k=4, chunk_size=32, value_bits=2), "two_phase"),
    (gck.Quantize(4, 32), "two_phase"),
    (gck.LowRank(rank=2), "factored"),
    (gck.Sign(32), "dense"),
]


def gradients(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(numel, generator=generator) for numel in NUMELS.values()]


def content(residuals: gck.ErrorFeedbackMap) -> dict[str, tuple[Tensor | None, ...]]:
    states = copy.deepcopy(residuals).items()
    return {name: (state.worker, state.server, state.basis) for name, state in states}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal bytes; a tensor that was never used, and one that was reset, are the same."""
    return all(
        (x is None and y is None) or (x is not None and y is not None and same_bytes(x, y))
        for name in a | b
        for x, y in zip(a.get(name, (None,) * 3), b.get(name, (None,) * 3), strict=True)
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("compressor", "algorithm"), CASES, ids=lambda value: str(value).split("(")[0])
def test_overflow_on_one_rank_skips_the_step_on_all(compressor: Any, algorithm: str, bad: float) -> None:
    """Also the first step, of which nothing must stay; in any tensor, on any rank."""
    overflows = {0: (2, 0, 3), 2: (0, 0, 699), 3: (1, 2, 4)}  # step: (rank, tensor, entry)

    def train(member: SimulatedMember) -> list[bool]:
        residuals, skipped = gck.ErrorFeedbackMap(), []
        if algorithm == "dense":
            for name, numel in NUMELS.items():
                residuals[name].worker_for(torch.zeros(numel)).fill_(0.5)
        for step in range(5):
            grads, before = gradients(member.rank, step), content(residuals)
            rank, tensor, entry = overflows.get(step, (-1, 0, 0))
            if rank == member.rank:
                grads[tensor][entry] = bad
            with gck.skip_nonfinite(residuals, grads) as guard:
                for name, grad in zip(NUMELS, grads, strict=True):
                    all_reduce_(grad, residuals[name], compressor, member, algorithm=algorithm)
            skipped.append(guard.skipped)
            assert guard.skipped == any(not grad.isfinite().all() for grad in grads)
            if guard.skipped:
                assert same(content(residuals), before)
            elif algorithm != "dense":  # which leaves zeros, again and again
                assert not same(content(residuals), before)
        return skipped

    assert SimulatedGroup(3).run(train) == [[step in overflows for step in range(5)]] * 3


def test_it_sends_nothing() -> None:
    def step(member: SimulatedMember, guarded: bool) -> None:
        grads, states = gradients(member.rank, 0), [gck.ErrorFeedback() for _ in NUMELS]
        if guarded:
            with gck.skip_nonfinite(states, grads):
                all_reduce_many_(grads, states, gck.Sign(32), member)
        else:
            all_reduce_many_(grads, states, gck.Sign(32), member)

    sent = []
    for guarded in (False, True):
        group = SimulatedGroup(3)
        group.run(step, guarded)
        sent.append(group.bytes_sent)
    assert sent[0] == sent[1]


@pytest.mark.parametrize("kind", ["one", "list", "map"])
def test_an_error_puts_all_residuals_of_the_step_back(kind: str) -> None:
    """Those that were reduced before it, too."""
    member, residuals = SimulatedGroup(1).members[0], gck.ErrorFeedbackMap()
    grads = gradients(0, 0)
    all_reduce_(grads[0], residuals["a"], gck.Sign(32), member, algorithm="one_phase")
    before, grads = content(residuals), gradients(0, 1)
    held: Any = {"one": residuals["a"], "list": [residuals["a"]], "map": residuals}[kind]

    def step() -> None:
        with gck.skip_nonfinite(held, grads):
            all_reduce_(grads[0], residuals["a"], gck.Sign(32), member, algorithm="one_phase")
            assert not same(content(residuals), before)
            if kind == "map":
                all_reduce_(grads[1], residuals["b"], gck.Sign(32), member, algorithm="one_phase")
            all_reduce_(grads[2], None, gck.Sign(32), member, op="max")

    with pytest.raises(gck.errors.ArgumentError, match="op must be"):
        step()
    assert same(content(residuals), before)


def test_a_guard_uses_its_memory_again() -> None:
    guard, state = StepGuard(), gck.ErrorFeedback()
    worker, result = state.worker_for(torch.ones(50)), torch.ones(3)
    copies = set()
    for step in range(4):
        worker.fill_(step)
        state.basis = basis = torch.full((1, 1), float(step))
        guard.keep([state, None])
        guard.keep([state])  # not again: the step has begun
        guard.watch(result)
        worker.fill_(-1)
        state.basis = None
        if step == 2:
            result[1] = math.nan
        assert guard.finish() == (step >= 2)
        assert bool((worker == (step if step >= 2 else -1)).all())
        assert state.basis is (basis if step >= 2 else None)
        ((_, snapshot),) = guard._spare.values()
        assert snapshot.worker is not None
        copies.add(snapshot.worker[1].data_ptr())
    assert len(copies) == 1
    # Other buffers, other copies.
    state.reset()
    assert state.worker_for(torch.ones(60)) is state.worker
    guard.keep([state])
    state.worker_for(torch.ones(60)).fill_(5)
    guard.abandon()
    assert not state.worker_for(torch.ones(60)).any()


def test_scaled_training_is_unscaled_training() -> None:
    """The scale doubles and halves at overflows; rescaled residuals make the same weights, bit for bit."""
    compressor, factors = gck.Sign(32), {2: 2.0, 3: 0.5, 6: 4.0}

    def train(
        member: SimulatedMember, scaled: bool, rescale: bool = True
    ) -> tuple[Tensor, gck.ErrorFeedback]:
        x, state, scale = torch.ones(200), gck.ErrorFeedback(), 1024.0 if scaled else 1.0
        target = torch.randn(200, generator=torch.Generator().manual_seed(member.rank))
        for step in range(10):
            if scaled and step in factors:
                scale *= factors[step]
                if rescale:
                    state.rescale_(factors[step])
            grad = (x - target) * scale
            if step == 5:
                if not scaled:
                    continue
                grad[7] = math.inf if member.rank == 1 else 1.0
            with gck.skip_nonfinite(state, [grad]) as guard:
                all_reduce_(grad, state, compressor, member, algorithm="two_phase")
            assert guard.skipped == (step == 5)
            if not guard.skipped:
                x -= 0.1 * (grad / scale)
        state.rescale_(1 / scale)
        return x, state

    plain, scaled = SimulatedGroup(3).run(train, False), SimulatedGroup(3).run(train, True)
    for (x, state), (y, other) in zip(plain, scaled, strict=True):
        assert same_bytes(x, y)
        assert same_bytes(state.worker, other.worker)
        assert same_bytes(state.server, other.server)
    forgetful = SimulatedGroup(3).run(train, True, False)
    assert not same_bytes(plain[0][0], forgetful[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_found_anywhere(dtype: torch.dtype) -> None:
    numel = 100_003
    tensors = [
        torch.zeros(0, dtype=dtype),
        torch.full((numel,), 6e4, dtype=dtype),
        torch.ones(3, dtype=dtype),
    ]
    assert not any_nonfinite(tensors)
    assert not any_nonfinite([])
    for value in (math.inf, -math.inf, math.nan):
        for at in (0, 15, 50_000, numel - 1):
            tensors[1][at] = value
            assert any_nonfinite(tensors)
            tensors[1][at] = 0
