"""What is told of many tensors at once is what the checks of each would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.errors import ArgumentError, DtypeError, GckError, LayoutError
from gck.kernels.common import checks
from gck.kernels.topk.lists import bodies_of
from gck.wire import Layout
from tests.cases import same_bytes

MEMORY = torch.zeros(64, dtype=torch.uint8)
SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=6)


def overlap(tensors: list[Tensor]) -> bool:
    try:
        checks.check_no_overlap("f", **{f"t{i}": tensor for i, tensor in enumerate(tensors)})
    except LayoutError:
        return True
    return False


@given(SPANS)
def test_apart(spans: list[tuple[int, int]]) -> None:
    tensors = [MEMORY[start : start + length] for start, length in spans]
    taken = [place for start, length in spans for place in range(start, start + length)]
    assert checks.apart(tensors) == (len(taken) == len(set(taken)))
    assert checks.apart(tensors) != overlap(tensors)


def one_by_one(grads: list[Any], errs: list[Any]) -> bool:
    try:
        for grad, err in zip(grads, errs, strict=True):
            checks.check_grad("f", grad)
            checks.check_fp32("f", "err", err)
            checks.check_same("f", "err", err, "grad", grad)
            checks.check_device("f", "grad", grad, "grad[0]", grads[0])
    except GckError:
        return False
    return True


FINE: dict[str, Tensor] = {
    "fp32": torch.ones(6),
    "2d": torch.ones(2, 3),
    "bf16": torch.ones(6).bfloat16(),
    "fp16": torch.ones(6).half(),
    "empty": torch.ones(0),
    "parameter": torch.nn.Parameter(torch.ones(6)),
    "fp64": torch.ones(6).double(),
    "strided": torch.ones(12)[::2],
    "sparse": torch.ones(6).to_sparse(),
    "meta": torch.ones(6, device="meta"),
    "five": torch.ones(5),
}


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("err", FINE)
@pytest.mark.parametrize("grad", FINE)
def test_acceptable_pairs(grad: str, err: str, recording: bool) -> None:
    grads, errs = [torch.ones(6), FINE[grad]], [torch.ones(6), FINE[err]]
    with torch.set_grad_enabled(recording):
        assert checks.acceptable_pairs(grads, errs) == one_by_one(grads, errs)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numels", [[], [0, 0], [100, 0, 7, 33], [5, 2**31 + 5, 0, 9]], ids=str)
def test_fields_of_bodies(numels: list[int], value_dtype: torch.dtype) -> None:
    """The views that each body's own layout gives."""
    counts = [min(n, 3 + i) for i, n in enumerate(numels)]
    bodies = bodies_of(numels, counts, value_dtype)
    assert bodies is bodies_of(numels, counts, value_dtype)
    memory = torch.arange(bodies.nbytes, dtype=torch.uint8)
    values, indices = bodies.fields(memory)
    assert len(values) == len(indices) == len(numels)
    for i, n in enumerate(numels):
        wide = torch.int64 if n > 2**31 else torch.int32
        layout = Layout.of((value_dtype, counts[i]), (wide, counts[i]))
        wanted = layout.views(memory[bodies.starts[i] : bodies.starts[i] + layout.nbytes])
        assert same_bytes(values[i], wanted[0])
        assert same_bytes(indices[i], wanted[1])
        assert bodies.offset(i, 1) == bodies.starts[i] + layout.fields[1].offset
    assert sum(layout.nbytes for layout in bodies.layouts) == bodies.nbytes


@pytest.mark.parametrize("function", [gck.topk, lambda x, *a, **k: gck.topk_ef_(x, torch.zeros(9), *a, **k)])
def test_what_is_remembered_lets_nothing_else_pass(function: Any) -> None:
    """True equals 1, but is no ratio and no k; a list has no hash."""
    x = torch.ones(9)
    for _ in range(2):
        assert function(x, 1.0).indices.numel() == 9
        assert function(x, 1).indices.numel() == 9
        assert function(x, k=1).indices.numel() == 1
        with pytest.raises(DtypeError, match=r"ratio must be a number, got True \(bool\)"):
            function(x, True)
        with pytest.raises(DtypeError, match=r"k must be an int, got True \(bool\)"):
            function(x, k=True)
        with pytest.raises(DtypeError, match=r"k must be an int, got \[1\] \(list\)"):
            function(x, k=[1])
        with pytest.raises(DtypeError, match=r"value_dtype must be .*, got \['a'\]"):
            function(x, k=1, value_dtype=["a"])
        with pytest.raises(ArgumentError, match="at most the number of elements 9, got 10"):
            function(x, k=10)
