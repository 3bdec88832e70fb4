"""Numbers that no float holds, and how errors quote the values that they refuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.values import MOST, shown


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Nothing:
    pass


SHOWN: dict[str, tuple[Any, str]] = {
    "none": (None, "None"),
    "text": ("abc", "'abc' (str)"),
    "float": (3.5, "3.5 (float)"),
    "bool": (True, "True (bool)"),
    "bytes": (b"ab", "b'ab' (bytes)"),
    "class": (gck.Sign, "the class Sign"),
    "compressor": (gck.Sign(), "Sign(chunk_size=256, decay=1.0, clip=None) (Sign)"),
    "tensor": (torch.ones(2, 3), "a tensor of shape (2, 3), torch.float32, cpu"),
    "parameter": (torch.nn.Parameter(torch.ones(2)), "a tensor of shape (2,), torch.float32, cpu"),
    "meta": (torch.ones((), device="meta"), "a tensor of shape (), torch.float32, meta"),
    "list": ([1.0, "a"], "[1.0, 'a'] (list)"),
    "tensors": ([torch.ones(2), torch.ones(3)], "[<Tensor of shape (2,)>, <Tensor of shape (3,)>] (list)"),
    "state": (OrderedDict(a=torch.ones(2)), "{'a': <Tensor of shape (2,)>} (OrderedDict)"),
    "payload": (
        gck.SeededValues(torch.ones(2), 5, 9),
        "SeededValues(values=<Tensor of shape (2,)>, seed=5, numel=9) (SeededValues)",
    ),
    "factors": (
        gck.LowRankFactors(torch.ones(2, 3), torch.ones(2, 4), 11, 4),
        "LowRankFactors(left=<Tensor of shape (2, 3)>, right=<Tensor of shape (2, 4)>,... (LowRankFactors)",
    ),
    "statistics": (
        gck.Statistics(torch.ones(5)),
        "Statistics(values=<Tensor of shape (5,)>, numel=None) (Statistics)",
    ),
    "nested": (
        [gck.Statistics(torch.ones(5))],
        "[Statistics(values=<Tensor of shape (5,)>, numel=None)] (list)",
    ),
    "deep": ([[[[[1]]]]], "[[[[...]]]] (list)"),
    "no repr": (Nothing(), "<Nothing object> (Nothing)"),
    "a large number": (10**5000, "an object that cannot be shown (int)"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_shown(name: str) -> None:
    value, text = SHOWN[name]
    assert shown(value) == text


def test_arrays_are_shown_without_contents() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.ones((2, 3), numpy.float32)
    assert shown(array) == "an array of shape (2, 3), float32 (ndarray)"
    assert shown([array]) == "[<ndarray of shape (2, 3)>] (list)"
    assert "2.5" in shown(numpy.float32(2.5))
    assert shown(numpy.float32(2.5)).endswith("(float32)")


@pytest.mark.parametrize("value", [Silent(), [Silent()], {"a": Silent()}])
def test_what_has_no_text_is_shown(value: Any) -> None:
    assert shown(value).endswith(f"({type(value).__name__})")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, list(range(10**6)), ["x" * 1000] * 9, dict.fromkeys(range(99), "x" * 99)],
    ids=["str", "bytes", "list", "list of str", "dict"],
)
def test_long_values_are_cut(value: Any) -> None:
    text = shown(value)
    assert "..." in text
    assert len(text) <= MOST + len(" (bytes)")
    assert text.endswith(f" ({type(value).__name__})")


def test_a_subclass_of_tensor_is_not_looked_into() -> None:
    class Watched(torch.Tensor):
        def __repr__(self, **_: Any) -> str:  # type: ignore[override]
            raise AssertionError("looked into")

    tensor = torch.ones(2).as_subclass(Watched)
    assert shown(tensor) == "a tensor of shape (2,), torch.float32, cpu"
    assert shown([tensor]) == "[<Watched of shape (2,)>] (list)"


LARGE = 10**400
PLACE: Any = {"rank": 0, "world_size": 1}
REFUSED: dict[str, Callable[[Path], Any]] = {
    "rescale_": lambda d: gck.ErrorFeedback().rescale_(LARGE),
    "of a map": lambda d: gck.ErrorFeedbackMap().rescale_(LARGE),
    "saved scale": lambda d: gck.save_state(d, gck.ErrorFeedback(), step=0, scale=LARGE, **PLACE),
    "saved step": lambda d: gck.save_state(d, gck.ErrorFeedback(), step=LARGE, **PLACE),
    "first step of too many digits": lambda d: gck.save_state(d, gck.ErrorFeedback(), step=2**63, **PLACE),
    "world size": lambda d: gck.save_state(d, gck.ErrorFeedback(), rank=0, world_size=2**31, step=0),
    "loaded scale": lambda d: gck.load_state(d, gck.ErrorFeedback(), scale=LARGE, **PLACE),
    "scale of the hook": lambda d: gck.ddp.HookState(gck.TopK(k=1)).set_scale(LARGE),
    "timeout": lambda d: gck.SimulatedGroup(1, LARGE),
    "timeout that no thread can wait": lambda d: gck.SimulatedGroup(1, 1e300),
    "timeout of the hook": lambda d: gck.ddp.HookState(gck.TopK(k=1), timeout=LARGE),
    "density": lambda d: gck.Statistics.empty().density(LARGE),
    "density of less than nothing": lambda d: gck.Statistics.empty().density(-1),
    "density of a fraction": lambda d: gck.Statistics.empty().density(0.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", REFUSED)
def test_numbers_out_of_range(call: str, tmp_path: Path) -> None:
    with pytest.raises(gck.errors.ArgumentError):
        REFUSED[call](tmp_path)
    assert not list(tmp_path.iterdir())
