"""Residuals times a factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import ArgumentError, LayoutError
from tests.test_error_feedback import BINDING, CPU, equal, used


def test_rescale_by_powers_of_two_is_exact() -> None:
    state = used()
    worker, server = state.worker_for(torch.ones(100)), state.server_for(64, CPU, BINDING)
    worker.copy_(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    before = worker.clone()
    state.rescale_(2.0**-10)
    assert torch.equal(worker.double(), before.double() * 2.0**-10)
    assert torch.equal(server, torch.full((64,), 2.0**-9))
    residuals = ErrorFeedbackMap()
    residuals["w"].load_state_dict(state.state_dict())
    residuals["fresh"].rescale_(2)
    residuals.rescale_(2**10)
    assert torch.equal(residuals["w"].worker_for(torch.ones(100)), before)
    assert state.state_dict()["nonfinite"] == residuals["w"].state_dict()["nonfinite"] == 5


def test_rescale_can_drop_what_would_not_be_finite() -> None:
    state = used()
    state.worker_for(torch.ones(100))[3] = 3e38
    state.rescale_(2.0, drop=True)
    assert state.worker is not None
    assert state.worker[3] == 0
    assert state.worker[4] == 8
    assert state.state_dict()["nonfinite"] == 6


@pytest.mark.parametrize(
    "factor", [0, -1.0, math.inf, math.nan, "2", True, pytest.param(10**400, id="large")]
)
def test_rescale_by_nonsense(factor: Any) -> None:
    state = used()
    for holder in (state, ErrorFeedbackMap()):
        with pytest.raises(ArgumentError, match="rescale_: factor must be positive and finite, got"):
            holder.rescale_(factor)
    assert equal(state, used())


def of(values: list[float]) -> ErrorFeedback:
    state = ErrorFeedback()
    state.worker_for(torch.ones(len(values))).copy_(torch.tensor(values))
    state.server_for(64, CPU, BINDING).fill_(values[0])
    return state


@pytest.mark.parametrize("factor", [1e-50, 1e-46, 1e39, 1e60, 1e-40, 0.1, 1 / 3, 1.5, 3e38])
def test_factors_that_fp32_does_not_have(factor: float) -> None:
    """What fits after the product is kept."""
    middle = min(1e35, max(1e-44, 1 / factor))  # times factor, it is a number of fp32
    state = of([middle, -middle * 0.3, -0.0, 0.0])
    before = state.worker_for(torch.ones(4)).clone()
    state.rescale_(factor)
    assert state.worker is not None
    assert state.server is not None
    assert torch.equal(state.worker, (before.double() * factor).float())
    assert state.server[0] == state.worker[0] != 0


def test_factors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gck.error_feedback.scaling.PIECE", 7)
    state = used()
    state.rescale_(0.1)
    assert torch.equal(state.worker_for(torch.ones(100)), (torch.arange(100.0).double() * 0.1).float())


@pytest.mark.parametrize(("value", "factor"), [(1.0, 1e39), (1e-3, 1e50), (-3e38, 2.0), (1e-44, 1e83)])
@pytest.mark.parametrize("kind", ["worker", "server"])
def test_what_would_not_be_finite_is_an_error(kind: str, value: float, factor: float) -> None:
    def state() -> ErrorFeedback:
        one = of([0.0, 1e-45])
        getattr(one, kind)[1] = value
        return one

    one, many = state(), ErrorFeedbackMap()
    text = f"^ErrorFeedback.rescale_: the {kind} residual would not be finite, times "
    with pytest.raises(ArgumentError, match=text):
        one.rescale_(factor)
    assert equal(one, state())
    many["first"].load_state_dict(of([1e-45, 0.0]).state_dict())
    many["last"].load_state_dict(state().state_dict())
    with pytest.raises(ArgumentError, match=f"^ErrorFeedbackMap.rescale_: the {kind} residual of 'last' "):
        many.rescale_(factor)
    assert equal(many["first"], of([1e-45, 0.0]))
    assert equal(many["last"], state())


def test_the_largest_number_is_one() -> None:
    most = torch.finfo(torch.float32).max
    state = of([1.0])
    state.rescale_(most * (1 + 2**-26))  # rounds to it
    assert state.worker_for(torch.ones(1)) == most
    with pytest.raises(ArgumentError, match="would not be finite"):
        of([1.0]).rescale_(most * (1 + 2**-24))


def test_the_hook_drops_what_would_not_be_finite() -> None:
    """On the scaler's word, which comes in the middle of a step, one rank must not fail alone."""
    hook = gck.ddp.HookState(gck.TopK(k=1))
    hook.residuals["w"].load_state_dict(of([3e38, 1.0]).state_dict())
    hook.set_scale(2.0)
    state = hook.residuals["w"]
    assert state.worker_for(torch.ones(2)).tolist() == [0, 2]
    assert state.state_dict()["nonfinite"] == 65


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_residuals_without_memory_change_nothing(factor: float, drop: bool) -> None:
    """Of a map, none is multiplied."""
    states = ErrorFeedbackMap()
    for name in ("a", "b"):
        states[name].worker_for(torch.ones(100))
        residual = states[name].worker
        assert residual is not None
        residual.fill_(1.0)
    broken = states["b"].worker
    assert broken is not None
    broken.untyped_storage().resize_(396)
    with pytest.raises(LayoutError, match=r"^ErrorFeedbackMap.rescale_: the worker residual of 'b' has no"):
        states.rescale_(factor, drop=drop)
    with pytest.raises(LayoutError, match=r"^ErrorFeedback.rescale_: the worker residual has no memory"):
        states["b"].rescale_(factor, drop=drop)
    assert states["a"].worker is not None
    assert bool((states["a"].worker == 1).all())
