"""How errors quote the values that they refuse."""

from __future__ import annotations

from collections import OrderedDict
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
    "statistics": (
        gck.Statistics(torch.ones(5)),
        "Statistics(values=<Tensor of shape (5,)>) (Statistics)",
    ),
    "nested": ([gck.Statistics(torch.ones(5))], "[Statistics(values=<Tensor of shape (5,)>)] (list)"),
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
