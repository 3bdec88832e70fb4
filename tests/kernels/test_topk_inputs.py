"""Top-k on inputs that are hard to select from, with and without a hint, compared with the oracle by bytes.

Sizes are such that the CPU guesses from a sample, and lists what it guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from bench import inputs
from gck.errors import (
    ArgumentError,
    AutogradError,
    DeviceMismatchError,
    DtypeError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.topk import reference
from tests.cases import Guarded, same_bytes
from tests.contract import check_case

SIZES = (70_001, 300_007)
INFINITY, LARGEST = 0x7F800000, 2**31 - 1


@lru_cache(maxsize=4)
def given_input(name: str, n: int) -> tuple[Tensor, Tensor]:
    return inputs.make(name, n)


def counts(grad: Tensor, err: Tensor) -> list[int]:
    """One, 1 %, 10 %, as many as are not zero and one fewer and more, half, all."""
    n, nonzeros = grad.numel(), int(torch.count_nonzero(grad.float() + err))
    wanted = {1, n // 100, n // 10, nonzeros - 1, nonzeros, nonzeros + 1, n // 2, n}
    return sorted(k for k in wanted if 1 <= k <= n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", inputs.INPUTS)
def test_by_bytes(name: str, n: int) -> None:
    grad, err = given_input(name, n)
    for k in counts(grad, err):
        check_case(gck.TopK(k=k), "cpu", grad, err)


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_half_precision(name: str) -> None:
    grad, err = given_input(name, SIZES[0])
    for dtype, k in ((torch.bfloat16, 700), (torch.float16, 7000)):
        check_case(gck.TopK(k=k, value_dtype=torch.bfloat16), "cpu", grad.to(dtype), err)


def hints_for(key: int) -> Iterator[int]:
    """Good, none, a little and far too high and low, at infinity and beyond it, the largest, garbage."""
    yield from (key, 0, 1, min(key + 1, LARGEST), max(key - 1, 0), min(int(key * 1.01), LARGEST))
    yield from (int(key * 0.99), INFINITY - 1, INFINITY, INFINITY + 1, LARGEST, -1, -(2**31), 123_456_789)


def check_hinted(grad: Tensor, err: Tensor, k: int, value_dtype: torch.dtype = torch.float32) -> None:
    """Whatever a hint holds, the result is the reference's, and it holds this threshold afterwards."""
    (values, indices), residual, cleared = reference.compress(
        gck.TopK(k=k, value_dtype=value_dtype), grad, err
    )
    acc = grad.float() + err
    acc = torch.where(acc.isnan(), math.nan, acc)
    key = int((acc.view(torch.int32) & 0x7FFFFFFF)[indices.long()].min())
    for start in hints_for(key):
        g, e = Guarded.of(grad), Guarded.of(err)
        hint, nonfinite = torch.tensor([start], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        payload = gck.topk_ef_(g.inner, e.inner, k=k, value_dtype=value_dtype, nonfinite=nonfinite, hint=hint)
        assert same_bytes(payload.values, values)
        assert same_bytes(payload.indices, indices)
        assert same_bytes(e.inner, residual)
        assert same_bytes(g.inner, grad)
        assert e.intact()
        assert int(nonfinite) == cleared
        assert 0 <= int(hint) <= key
        # All k entries reach what it holds, and no others would have been needed.
        assert int(hint) == key or k == grad.numel()


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_hints(name: str) -> None:
    grad, err = given_input(name, SIZES[0])
    check_hinted(grad, err, SIZES[0] // 100)
    check_hinted(grad.bfloat16(), err, SIZES[0] // 10, torch.bfloat16)


@pytest.mark.parametrize("n", [1, 100, 5000])
def test_hints_of_few(n: int) -> None:
    grad, err = given_input("Cauchy", n)
    check_hinted(grad, err, max(1, n // 10))


def test_a_hint_lives_from_step_to_step() -> None:
    """Each step's hint is the threshold of the step before, on gradients that grow and shrink."""
    n, hint = SIZES[0], torch.zeros(1, dtype=torch.int32)
    err, plain = torch.zeros(n), torch.zeros(n)
    for step, scale in enumerate((1, 1.02, 0.97, 30, 1e-3, 0, 1)):
        grad = given_input("Laplace", n)[0].roll(step) * scale
        hinted, unhinted = gck.topk_ef_(grad, err, 0.01, hint=hint), gck.topk_ef_(grad, plain, 0.01)
        assert same_bytes(hinted.values, unhinted.values)
        assert same_bytes(hinted.indices, unhinted.indices)
        assert same_bytes(err, plain)
        assert int(hint) == int(hinted.values.abs().min().view(torch.int32))


BAD_HINTS: dict[str, tuple[type[Exception], str, Any]] = {
    "no tensor": (DtypeError, "must be a tensor, got 3 (int)", 3),
    "dtype": (DtypeError, "must be int32, got torch.int64", torch.zeros(1, dtype=torch.int64)),
    "float": (DtypeError, "must be int32, got torch.float32", torch.zeros(1)),
    "two": (ShapeMismatchError, "must have one element, got shape (2,)", torch.zeros(2, dtype=torch.int32)),
    "none": (ShapeMismatchError, "must have one element, got shape (0,)", torch.zeros(0, dtype=torch.int32)),
    "device": (
        DeviceMismatchError,
        "must be on the device of grad, got meta and cpu",
        torch.zeros(1, dtype=torch.int32, device="meta"),
    ),
}


@pytest.mark.parametrize("bad", BAD_HINTS)
def test_bad_hints_change_nothing(bad: str) -> None:
    error, text, hint = BAD_HINTS[bad]
    err = torch.ones(300)
    with pytest.raises(error) as caught:
        gck.topk_ef_(torch.ones(300), err, 0.1, hint=hint)
    assert str(caught.value) == f"topk_ef_: hint {text}"
    assert torch.equal(err, torch.ones(300))


def test_a_hint_shares_no_memory_and_is_not_for_lists() -> None:
    grad, err = torch.ones(300), torch.ones(300)
    for taken in (grad, err):
        with pytest.raises(LayoutError, match="overlap in memory"):
            gck.topk_ef_(grad, err, 0.1, hint=taken[:1].view(torch.int32))
    counter = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(LayoutError, match="overlap in memory"):
        gck.topk_ef_(grad, err, 0.1, nonfinite=counter, hint=counter.view(torch.int32)[:1])
    with pytest.raises(ArgumentError, match="topk_ef_: hint is for single tensors, got one with lists"):
        gck.topk_ef_([grad], [err], 0.1, hint=torch.zeros(1, dtype=torch.int32))  # type: ignore[call-overload]
    with torch.inference_mode():
        hint = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(AutogradError, match="hint was made in inference mode"):
        gck.topk_ef_(grad, err, 0.1, hint=hint)
    assert torch.equal(grad, torch.ones(300))
    assert torch.equal(err, torch.ones(300))


@pytest.mark.parametrize("n", [1000, 70_001])
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0xFF800001 - 2**32])
def test_any_nan_reaches_the_receiver(n: int, bits: int) -> None:
    """Whatever bits a NaN has, the largest pattern among them: the path for k > n / 2 once lost that one."""
    grad = torch.zeros(n)
    grad.view(torch.int32)[7] = bits
    for k in (1, n // 100, n // 2 + 1, n):
        check_case(gck.TopK(k=k), "cpu", grad, torch.zeros(n))
