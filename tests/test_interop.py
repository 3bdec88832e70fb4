"""Arrays of other libraries: which stream of torch's they are worked on in, and that they come back."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gck
from gck.interop import borrowed


@pytest.mark.parametrize(("handle", "expected"), [(0, "default of cuda:3"), (2, "external 2 of cuda:3")])
def test_streams_by_their_handles(handle: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is the default stream: ExternalStream(0) would be one of torch's own, out of order with it."""

    class Array:
        device = SimpleNamespace(id=3)

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    entered: list[str] = []

    def enter(stream: str) -> Any:
        entered.append(stream)
        return nullcontext()

    streams = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=handle))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Array, cuda=streams))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: f"external {ptr} of {device}")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    monkeypatch.setattr(torch.cuda, "stream", enter)
    array = Array(torch.ones(3))
    with borrowed("test", ("x",), x=array) as [tensor]:
        assert entered == [expected]
        tensor.fill_(2)
    assert array.tensor.tolist() == [2, 2, 2]
    with borrowed("test", (), x=torch.ones(3)):  # of torch alone: its own current stream
        assert entered == [expected]


class Foreign:
    """An array of a library that gck does not know, which speaks DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Elder(Foreign):
    """Of before DLPack 1.0."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [Foreign, Elder])
def test_arrays_that_are_read_only(kind: type[Foreign]) -> None:
    """They are read, and never written to: as gradients of libraries whose arrays do not change."""
    np = pytest.importorskip("numpy")
    grad, err = np.array([1.0, 4.0, -3.0], dtype=np.float32), np.zeros(3, dtype=np.float32)
    payload = gck.topk_ef_(kind(grad), kind(err), k=1)
    assert payload.values.tolist() == [4.0]
    assert err.tolist() == [1.0, 0.0, -3.0]
    err.flags.writeable = False
    state, member = gck.ErrorFeedback(), gck.SimulatedGroup(1).members[0]
    calls: list[Any] = [
        lambda: gck.topk_ef_(kind(grad), kind(err), k=1),
        lambda: gck.all_reduce_(kind(err), state, gck.Sign(32), member),
        lambda: gck.decompress(payload, out=kind(err)),
    ]
    for call in calls:
        # NumPy gives no capsule without a flag of what is read only.
        with pytest.raises(gck.errors.LayoutError, match=r"read-only|readonly"):
            call()
        assert err.tolist() == [1.0, 0.0, -3.0]
    if kind is Foreign and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9):
        grad.flags.writeable = False
        err.flags.writeable = True
        gck.topk_ef_(kind(grad), kind(err), k=1)
        assert grad.tolist() == [1.0, 4.0, -3.0]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("compressor", ["topk", "low_rank"])
def test_results_come_back_as_what_was_given(compressor: str, many: bool) -> None:
    np = pytest.importorskip("numpy")
    payload: Any = gck.topk(torch.tensor([1.0, 4.0, -3.0]), k=2)
    if compressor == "low_rank":
        payload = gck.LowRankFactors(torch.tensor([[0.0, 1.0, -0.75]]), torch.tensor([[4.0]]), 3, 1)
    out = np.ones(3, dtype=np.float32)
    given = [payload, payload] if many else payload
    assert gck.decompress(given, out=out) is out
    assert gck.decompress_add_(out, given) is out
    assert out.tolist() == [0.0, 8.0 * (1 + many), -6.0 * (1 + many)]
    tensor = torch.ones(3)
    assert gck.decompress(given, out=tensor) is tensor
    assert gck.decompress_add_(tensor, given) is tensor


@pytest.mark.parametrize("kind", [lambda array: array, Foreign], ids=["numpy", "foreign"])
def test_many_gradients_at_once(kind: Any) -> None:
    """Beside tensors, too; each is written to where it lies."""
    np = pytest.importorskip("numpy")
    member = gck.SimulatedGroup(1).members[0]
    arrays = [np.arange(64, dtype=np.float32), np.ones(3, dtype=np.float16)]
    tensor = torch.arange(64, dtype=torch.float32)
    expected = gck.all_reduce_(tensor.clone(), None, gck.Sign(32), member, algorithm="one_phase")
    states = [gck.ErrorFeedback() for _ in range(3)]
    gck.all_reduce_many_([*map(kind, arrays), tensor], states, gck.Sign(32), member, algorithm="one_phase")
    assert arrays[0].tolist() == tensor.tolist() == expected.tolist()
    assert arrays[1].tolist() == [1, 1, 1]
    assert [None if state.worker is None else state.worker.numel() for state in states] == [64, 3, 64]
    with pytest.raises(gck.errors.ArgumentError, match="all_reduce_many_: async_op=True takes tensors, got"):
        gck.all_reduce_many_([tensor, kind(arrays[0])], states[1:], gck.Sign(32), member, async_op=True)
