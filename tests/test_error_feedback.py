"""Residual state: allocation, what it belongs to, and checkpoints."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, ServerBinding
from gck.errors import ArgumentError, DtypeError, StateMismatchError

CPU = torch.device("cpu")
BINDING = ServerBinding(rank=1, world_size=2, unit=64)


def used() -> ErrorFeedback:
    state = ErrorFeedback()
    state.worker_for(torch.ones(100)).copy_(torch.arange(100.0))
    state.server_for(64, CPU, BINDING).fill_(2.0)
    state.nonfinite_for(CPU).fill_(5)
    return state


def through_disk(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(a: ErrorFeedback, b: ErrorFeedback) -> bool:
    def same(x: Any, y: Any) -> bool:
        return (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))

    tensors = all(same(getattr(a, n), getattr(b, n)) for n in ("worker", "server", "nonfinite"))
    return tensors and a.binding == b.binding


def test_allocated_as_zeros_on_first_use_and_kept() -> None:
    state = ErrorFeedback()
    assert state.worker is None
    grad = torch.ones(4, 5, dtype=torch.bfloat16)
    worker = state.worker_for(grad)
    assert worker.dtype == torch.float32
    assert worker.shape == (20,)
    assert not worker.any()
    assert state.worker_for(grad) is worker
    server = state.server_for(64, CPU, BINDING)
    assert not server.any()
    assert state.server_for(64, CPU, BINDING) is server
    assert state.binding == BINDING
    assert "worker=20, server=64" in repr(state)
    state.reset()
    assert equal(state, ErrorFeedback())


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda s: s.worker_for(torch.ones(99)), "belongs to 100 elements, got a gradient of 99"),
        (lambda s: s.server_for(64, CPU, BINDING._replace(rank=0)), "rank=0"),
        (lambda s: s.server_for(64, CPU, BINDING._replace(world_size=3)), "world_size=3"),
        (lambda s: s.server_for(64, CPU, BINDING._replace(unit=32)), "unit=32"),
        (lambda s: s.server_for(128, CPU, BINDING), "with 128"),
    ],
)
def test_use_for_something_else(use: Callable[[ErrorFeedback], Any], text: str) -> None:
    state = used()
    with pytest.raises(StateMismatchError, match=text):
        use(state)
    assert equal(state, used())


def test_moves_with_the_gradient() -> None:
    state = used()
    assert state.worker_for(torch.ones(100, device="meta")).device.type == "meta"
    assert state.server_for(64, torch.device("meta"), BINDING).device.type == "meta"
    assert state.nonfinite_for(torch.device("meta")).device.type == "meta"


def test_restore_brings_back_content_in_place() -> None:
    state = used()
    worker, saved = state.worker, state.snapshot()
    assert worker is not None
    worker.zero_()
    state.server = state.binding = None
    state.restore(saved)
    assert state.worker is worker
    assert equal(state, used())

    fresh = ErrorFeedback()
    saved = fresh.snapshot()
    fresh.worker_for(torch.ones(3))
    fresh.restore(saved)
    assert fresh.worker is None


@pytest.mark.parametrize("make", [used, ErrorFeedback])
def test_state_survives_the_disk(make: Callable[[], ErrorFeedback]) -> None:
    loaded = ErrorFeedback()
    saved = make()
    loaded.load_state_dict(through_disk(saved.state_dict()), numel=100, rank=1, world_size=2)
    assert equal(loaded, saved)
    # A copy: what happens to one does not happen to the other.
    if saved.worker is not None:
        saved.worker.zero_()
        assert equal(loaded, used())


@pytest.mark.parametrize(
    ("change", "expected", "text"),
    [
        ({}, {"numel": 99}, "saved worker residual has 100 elements, the gradient 99"),
        ({}, {"rank": 0}, "belongs to rank 1, this is rank 0"),
        ({}, {"world_size": 4}, "belongs to world size 2, this is world size 4"),
        ({"version": 2}, {}, "must have version 1, got 2"),
        ({"worker": torch.zeros(100).half()}, {}, "worker residual must be flat float32"),
        ({"worker": [0.0]}, {}, r"worker residual must be flat float32, got \[0.0\] \(list\)"),
        ({"worker": torch.tensor([1.0, math.nan]).repeat(50)}, {}, "worker residual must be finite"),
        (
            {"server": torch.tensor([1.0, -math.inf]).repeat(32)},
            {},
            "server residual must be finite",
        ),
        ({"unit": "x"}, {}, "saved server residual"),
        ({"nonfinite": "many"}, {}, "nonfinite must be an int >= 0, got 'many'"),
        ({"nonfinite": None}, {}, "nonfinite must be an int >= 0, got None"),
        ({"nonfinite": -1}, {}, "nonfinite must be an int >= 0, got -1"),
        ({"nonfinite": 2**63}, {}, "nonfinite must be an int >= 0"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_states_that_do_not_fit(change: Any, expected: Any, text: str, fresh: bool) -> None:
    state = ErrorFeedback() if fresh else used()
    with pytest.raises(StateMismatchError, match=text):
        state.load_state_dict(used().state_dict() | change, **expected)
    assert equal(state, ErrorFeedback() if fresh else used())


def test_present_residuals_say_what_fits() -> None:
    state = ErrorFeedback()
    state.server_for(64, CPU, BINDING._replace(world_size=3))
    with pytest.raises(StateMismatchError, match="world size 2, this is world size 3"):
        state.load_state_dict(used().state_dict())
    state = ErrorFeedback()
    state.worker_for(torch.ones(7))
    with pytest.raises(StateMismatchError, match="100 elements, the gradient 7"):
        state.load_state_dict(used().state_dict())


def test_reset_server_keeps_the_worker() -> None:
    state = ErrorFeedback()
    state.load_state_dict(used().state_dict(), rank=0, world_size=3, reset_server=True)
    assert state.server is None
    assert state.binding is None
    assert torch.equal(state.worker_for(torch.ones(100)), torch.arange(100.0))


def test_loading_into_a_used_state_copies() -> None:
    """Also where the device is the same, and no conversion would make one."""
    saved, state = used(), used()
    state.load_state_dict(saved.state_dict())
    assert saved.worker is not None
    assert saved.server is not None
    saved.worker.zero_()
    saved.server.zero_()
    assert equal(state, used())


def test_not_a_dict() -> None:
    with pytest.raises(StateMismatchError, match=r"state must be a dict, got \[\] \(list\)"):
        ErrorFeedback().load_state_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [1, None, b"w", ("w", 0)])
def test_names_are_strings(name: Any) -> None:
    """As they are in files, where 1 and "1" would be one."""
    states = ErrorFeedbackMap()
    with pytest.raises(DtypeError, match="ErrorFeedbackMap: a name must be a str, got"):
        states[name]
    assert len(states) == 0


def test_map_is_by_name() -> None:
    residuals = ErrorFeedbackMap()
    assert "a" not in residuals
    assert residuals["a"] is residuals["a"]
    assert residuals["b"] is not residuals["a"]
    assert list(residuals) == ["a", "b"]
    assert len(residuals) == 2
    residuals.rename("a", "c")
    assert "a" not in residuals
    assert "c" in residuals
    residuals.reset()
    assert len(residuals) == 0


def test_map_survives_the_disk() -> None:
    residuals = ErrorFeedbackMap()
    residuals["w"].load_state_dict(used().state_dict())
    residuals["b"].worker_for(torch.ones(3))
    loaded = ErrorFeedbackMap()
    loaded["old"].worker_for(torch.ones(3))
    loaded.load_state_dict(
        through_disk(residuals.state_dict()), numels={"w": 100, "b": 3}, rank=1, world_size=2
    )
    assert sorted(loaded) == ["b", "w"]
    assert equal(loaded["w"], used())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"numels": {"w": 99}}, "w: .* 100 elements, the gradient 99"),
        ({"numels": {"v": 100}}, "no parameter is named 'w'"),
        ({"world_size": 8}, "w: .* world size 2, this is world size 8"),
    ],
)
def test_map_is_unchanged_when_one_state_does_not_fit(options: Any, text: str) -> None:
    saved, residuals = ErrorFeedbackMap(), ErrorFeedbackMap()
    saved["v"].worker_for(torch.ones(100))
    saved["w"].load_state_dict(used().state_dict())
    if "numels" in options:
        options = {"numels": {"v": 100} | options["numels"]}
    residuals["v"].worker_for(torch.ones(100)).fill_(7)
    with pytest.raises(StateMismatchError, match=text):
        residuals.load_state_dict(saved.state_dict(), **options)
    assert list(residuals) == ["v"]
    assert (residuals["v"].worker_for(torch.ones(100)) == 7).all()


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": 1, "tensors": 3}])
def test_map_of_malformed_states(state: Any) -> None:
    with pytest.raises(StateMismatchError):
        ErrorFeedbackMap().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": "a"}, DtypeError),
        ({"rank": True}, DtypeError),
        ({"rank": -1}, ArgumentError),
        ({"rank": 2, "world_size": 2}, ArgumentError),
        ({"world_size": 0}, ArgumentError),
        ({"world_size": 2.0}, DtypeError),
    ],
)
@pytest.mark.parametrize("saved", [ErrorFeedback, used])
def test_places_that_are_none(saved: Any, options: Any, error: type[Exception]) -> None:
    """Also where there is no server residual whose place could differ."""
    many = ErrorFeedbackMap()
    for state in (used(), many):
        with pytest.raises(error, match=r"load_state_dict: (rank|world_size) "):
            state.load_state_dict(saved().state_dict(), **options)
        assert equal(state, used()) if isinstance(state, ErrorFeedback) else not many


def test_places_may_be_numbers_of_numpy() -> None:
    place: Any = np.int64(1), np.int64(2), 32
    state = ErrorFeedback()
    state.worker, state.server, state.binding = torch.ones(64), torch.ones(32), ServerBinding(*place)
    saved = state.state_dict()
    assert {type(saved[key]) for key in ("rank", "world_size", "unit")} == {int}
    loaded = ErrorFeedback()
    loaded.load_state_dict(saved | {"rank": np.int64(1)}, rank=place[0], world_size=2)
    assert loaded.binding == (1, 2, 32)


@pytest.mark.parametrize(
    "change", [{"rank": -1}, {"world_size": 0}, {"rank": "1"}, {"unit": 0}, {"world_size": 2.5}]
)
def test_saved_places_that_are_none(change: Any) -> None:
    state = ErrorFeedback()
    with pytest.raises(StateMismatchError, match=r"ServerBinding.* in the saved server residual"):
        state.load_state_dict(used().state_dict() | change)
    assert equal(state, ErrorFeedback())


@pytest.mark.parametrize("numel", [-1, "100"])
def test_sizes_that_are_none(numel: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^ErrorFeedback.load_state_dict: numel "):
        ErrorFeedback().load_state_dict({"version": 1}, numel=numel)
    with pytest.raises(DtypeError, match=r"^ErrorFeedbackMap.load_state_dict: numels must be a dict, got"):
        ErrorFeedbackMap().load_state_dict({"version": 1, "tensors": {}}, numels=numel)


@pytest.mark.parametrize("fresh", [True, False])
def test_residuals_that_are_loaded_are_part_of_no_graph(fresh: bool) -> None:
    state = ErrorFeedback() if fresh else used()
    state.load_state_dict(used().state_dict() | {"worker": torch.arange(100.0).requires_grad_()})
    assert equal(state, used())
    assert state.worker is not None
    assert not state.worker.requires_grad
