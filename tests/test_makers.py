"""The function of the compiled module that goes from a public function to the kernel and back."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gck
from gck._native import sees_tensors
from gck.errors import LayoutError
from gck.ops import direct

needs_table = pytest.mark.skipif(not sees_tensors(), reason="torch has no DLPack table of functions")


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@needs_table
def test_a_maker_remembers_options_by_type_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    real = direct._known

    def known(*given: Any) -> Any:
        asked.append(given[1:])
        return real(*given)

    monkeypatch.setattr(direct, "_known", known)
    direct.maker.cache_clear()
    try:
        make = direct.maker(gck.TopK)
        grad, err = inputs(100)
        for ratio in (0.25, float("0.25"), 0.25):
            assert make(0, grad, err, ratio, None, torch.float32).values.numel() == 25
        assert len(asked) == 1
        assert make(0, grad, err, None, 1, torch.float32).values.numel() == 1
        for k in (True, 1.0):
            assert make(0, grad, err, None, k, torch.float32) is None
        assert make(0, grad, err, 0.25, None, torch.bfloat16).values.dtype is torch.bfloat16
        assert make(0, *inputs(50), 0.25, None, torch.float32).values.numel() == 13
        assert len(asked) == 6
        for _ in range(2):  # another object each time
            assert make(0, grad, err, np.float64(0.25), None, torch.float32).values.numel() == 25
        assert len(asked) == 8
        for k in range(1, 101):
            for n in range(100, 112):  # more than are remembered
                assert make(0, *inputs(n), None, k, torch.float32).values.numel() == k
        assert make(0, grad, err, 0.25, None, torch.float32).values.numel() == 25
    finally:
        direct.maker.cache_clear()


@needs_table
def test_a_maker_keeps_nothing_alive() -> None:
    grad, err = inputs(100)
    payload = gck.random_k_ef_(grad, err, k=3, seed=(seed := 10**12))
    before = [sys.getrefcount(x) for x in (grad, err, seed, type(payload), None)]
    for _ in range(1000):
        gck.random_k_ef_(grad, err, k=3, seed=seed)
        assert direct.maker(gck.RandomK)(seed, grad, grad, None, 3, 0, torch.float32) is None
    after = [sys.getrefcount(x) for x in (grad, err, seed, type(payload), None)]
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True))
    values = gck.topk_ef_(grad, err, k=5).values
    gone = weakref.ref(err)
    del err
    assert gone() is None
    assert values.numel() == 5  # and owns its memory


class Raising(torch.overrides.TorchFunctionMode):
    """Lets no call of this name through."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == self.name:
            raise KeyError(self.name)
        return func(*args, **(kwargs or {}))


@needs_table
@pytest.mark.parametrize("name", ["is_neg", "resize_"])
def test_errors_of_a_mode_are_its_own(name: str) -> None:
    grad, err = inputs(64)
    before = err.clone()
    with Raising(name), pytest.raises(KeyError, match=name):
        gck.topk_ef_(grad, err, k=2)
    assert torch.equal(err, before)


@needs_table
def test_memory_that_is_given_away_meanwhile_is_not_used() -> None:
    grad, err = inputs(64)

    class GivingAway(Raising):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "resize_":
                err.set_(torch.zeros(64))  # type: ignore[call-overload]
            return super().__torch_function__(func, types, args, kwargs)

    with GivingAway(""):
        assert direct.maker(gck.TopK)(0, grad, err, None, 2, torch.float32) is None
    assert not err.any()


def freed() -> Tensor:
    tensor = torch.ones(64)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("make", [freed, lambda: torch._efficientzerotensor(64)], ids=["freed", "zeros"])
@pytest.mark.parametrize("name", ["grad", "err"])
def test_tensors_without_memory_are_refused(name: str, make: Callable[[], Tensor]) -> None:
    both = dict(zip(("grad", "err"), inputs(64), strict=True)) | {name: make()}
    text = "has no memory: its storage was freed, or it is zeros of forward-mode differentiation; got"
    with pytest.raises(LayoutError, match=f"topk_ef_: {name} {text}"):
        gck.topk_ef_(**both, k=2)
    payload = gck.sign_ef_(*inputs(64))
    with pytest.raises(LayoutError, match=f"out {text}"):
        gck.decompress(payload, make())


@needs_table
def test_a_maker_says_what_it_takes() -> None:
    with pytest.raises(TypeError, match="seed, a gradient and a residual"):
        direct.maker(gck.Sign)(0)


@needs_table
def test_makers_in_many_threads() -> None:
    expected = {}
    for n in range(200, 232):
        grad, err = inputs(n)
        expected[n] = gck.topk_ef_(grad, err, k=n % 7 + 1), err

    def work(turn: int) -> None:
        for n in [*range(200 + turn, 232), *range(200, 200 + turn)] * 20:
            grad, err = inputs(n)
            payload = gck.topk_ef_(grad, err, k=n % 7 + 1)
            wanted, left = expected[n]
            assert torch.equal(payload.indices, wanted.indices)
            assert torch.equal(err, left)

    direct.maker.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
