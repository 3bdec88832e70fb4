"""Calls that the compiled module answers by itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck import memory
from gck._native import load, sees_tensors
from gck.errors import BackendUnavailableError, GckError
from gck.ops import direct
from gck.wire import body_in_place

ROOT = Path(__file__).parents[1]

needs_table = pytest.mark.skipif(not sees_tensors(), reason="torch has no DLPack table of functions")


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator).to(dtype), torch.randn(n, generator=generator)


# (gradient, residual) -> payload
VARIANTS: dict[str, Callable[[Any, Any], Any]] = {
    "topk": lambda g, e: gck.topk_ef_(g, e, 0.01),
    "topk-bf16": lambda g, e: gck.topk_ef_(g, e, 0.3, value_dtype=torch.bfloat16),
    "topk-fp16": lambda g, e: gck.topk_ef_(g, e, k=1, value_dtype=torch.float16),
    "topk-all": lambda g, e: gck.topk_ef_(g, e, 1.0),
    **{
        f"chunk-{bits}": lambda g, e, bits=bits: gck.chunk_topk_ef_(g, e, 1024, 100, value_bits=bits)
        for bits in (32, 16, 8, 4, 2)
    },
    "random": lambda g, e: gck.random_k_ef_(g, e, 0.1, seed=-(2**63)),
    "random-bf16": lambda g, e: gck.random_k_ef_(g, e, k=1, seed=7, value_dtype=torch.bfloat16),
    "random-all": lambda g, e: gck.random_k_ef_(g, e, 1.0, seed=7),
    "sign": gck.sign_ef_,
    "sign-32": lambda g, e: gck.sign_ef_(g, e, 32),
    "quantize": gck.quantize_ef_,
    "quantize-8": lambda g, e: gck.quantize_ef_(g, e, 8, 32, seed=-1),
    "quantize-random": lambda g, e: gck.quantize_ef_(g, e, 2, 64, "stochastic", -(2**63)),
    "quantize-mean": lambda g, e: gck.quantize_ef_(g, e, 2, scale="mean"),
}
variants = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


class Ways:
    """Runs calls, and sees which way they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.maker, self.decompress = direct.maker, direct.decompress

    def short(self, call: Callable[[], Any]) -> Any:
        """What the compiled module answers; None where it leaves the call to others."""
        answers: list[Any] = []

        def watched(real: Any) -> Any:
            return lambda *given: answers.append(real(*given)) or answers[-1]

        with self.monkeypatch.context() as patch:
            patch.setattr(direct, "maker", lambda kind: watched(self.maker(kind)))
            patch.setattr(direct, "decompress", watched(self.decompress))
            result = call()
        assert len(answers) == 1
        return None if answers[0] is None else result

    def long(self, call: Callable[[], Any]) -> Any:
        with self.monkeypatch.context() as patch:
            patch.setattr(direct, "maker", lambda _: lambda *_: None)
            patch.setattr(direct, "decompress", lambda *_: None)
            return call()

    def both_refuse(self, call: Callable[[], Any], *unchanged: torch.Tensor) -> None:
        """The short way leaves the call to the long one, whose error it then raises; nothing is written."""
        before, errors = [t.clone() for t in unchanged], []
        for way in (self.short, self.long):
            with pytest.raises(GckError) as raised:
                way(call)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]
        assert all(map(torch.equal, unchanged, before))


class Looking(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
    return alike and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@needs_table
@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 1000, 70_001])
def test_the_same_as_by_addresses(make: Any, n: int, dtype: torch.dtype, ways: Ways) -> None:
    grad, err = inputs(n, dtype)
    other, version = err.clone(), err._version
    payload = ways.short(lambda: make(grad, err))
    expected = ways.long(lambda: make(grad, other))
    assert type(payload) is type(expected)
    assert err._version > version
    assert torch.equal(err, other)
    for mine, theirs in zip(payload, expected, strict=True):
        assert same(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    body = body_in_place(*payload.fields)
    assert body is not None
    assert body.data_ptr() == payload.fields[0].data_ptr()
    assert torch.equal(body, body_in_place(*expected.fields))  # padding, too

    dense = ways.long(lambda: gck.decompress(expected))
    assert same(ways.short(lambda: gck.decompress(payload)), dense)
    out = torch.full((n,), 3.0)
    version = out._version
    assert ways.short(lambda: gck.decompress(payload, out)) is out
    assert out._version > version
    assert torch.equal(out, dense)
    assert ways.short(lambda: gck.decompress_add_(out, payload, 0.3)) is out
    assert torch.equal(out, ways.long(lambda: gck.decompress_add_(dense, expected, 0.3)))


@needs_table
def test_indices_of_12_bits(ways: Ways) -> None:
    grad, err = inputs(2500)
    compressor = gck.ChunkTopK(100, 1024, 8)
    layout = compressor.layout(2500)
    body = torch.zeros(layout.nbytes, dtype=torch.uint8)
    compressor.compress_(grad, err, body.unsqueeze(0))
    values, scales, indices = (field.view(3, -1) for field in layout.views(body))
    payload = gck.ChunkSparse(values, scales, indices, 2500, 1024, 100, 8)
    dense = ways.short(lambda: gck.decompress(payload))
    assert dense is not None
    assert torch.equal(dense, ways.long(lambda: gck.decompress(payload)))


@needs_table
@variants
def test_inputs_that_are_left_to_others(make: Any, ways: Ways) -> None:
    grad, err = inputs(64)
    apart = torch.zeros(200)
    wrong: list[tuple[Any, Any]] = [
        (grad[:63], err),
        (grad.double(), err),
        (grad, err.half()),
        (grad.view(8, 8).t(), err),
        (torch.zeros(128)[::2], err),
        (grad.to_sparse(), err),
        (grad, err.to("meta")),
        (apart[:64], apart[60:124]),
        (err, err),
        (grad.clone().requires_grad_(), err),
        (torch.nn.Parameter(grad), err),
        (grad.tolist(), err),
    ]
    for g, e in wrong:
        ways.both_refuse(lambda g=g, e=e: make(g, e), *([] if e.is_meta else [e]))
    payload = ways.short(lambda: make(grad.view(4, 1, 16), err))
    assert payload is not None
    assert ways.short(lambda: make(apart[:64], apart[64:128])) is not None

    first, *others = payload.fields
    rest = payload[1 + len(others) :]
    no_payloads = [
        type(payload)(*changed, *rest)
        for changed in (
            (first[:0], *others),
            (first.double() if first.is_floating_point() else first.float(), *others),
            (first.flatten().repeat(4)[::2], *others),
            (None, *others),
        )
    ]
    out = torch.ones(64)
    for bad in (*no_payloads, payload._replace(numel=65), payload._replace(numel=True)):
        ways.both_refuse(lambda bad=bad: gck.decompress(bad, out), out)
    for alpha in (float("nan"), float("inf"), True, "1"):
        ways.both_refuse(lambda alpha=alpha: gck.decompress_add_(out, payload, alpha), out)
    shared = first.view(torch.uint8)[:0].set_(first.untyped_storage()).view(torch.float32)
    for wrong_out in (out[:63], out.double(), torch.ones(128)[::2], out.clone().requires_grad_(), shared):
        ways.both_refuse(lambda o=wrong_out: gck.decompress_add_(o, payload), wrong_out.detach())


@needs_table
def test_payloads_that_contradict_themselves(ways: Ways) -> None:
    out = torch.ones(64)
    payload = gck.topk_ef_(*inputs(64), k=3)
    payload.indices[2] = 64
    ways.both_refuse(lambda: gck.decompress(payload, out), out)
    chunks = gck.chunk_topk_ef_(*inputs(64), 32, 3)
    chunks.indices[1, 2] = 32
    ways.both_refuse(lambda: gck.decompress(chunks, out), out)
    values = gck.random_k_ef_(*inputs(64), k=3, seed=1)
    for seed in (True, 1.0, 2**63):
        ways.both_refuse(lambda seed=seed: gck.decompress(values._replace(seed=seed), out), out)


@needs_table
def test_options_that_are_left_to_others(ways: Ways) -> None:
    grad, err = inputs(64)
    for call in (
        lambda: gck.topk_ef_(grad, err, k=65),  # more than there are
        lambda: gck.topk_ef_(grad, err, [0.1]),  # no ratio, and no key of a cache
        lambda: gck.topk_ef_(grad, err, k=True),
        lambda: gck.chunk_topk_ef_(grad, err, 4096, 2049),
        lambda: gck.chunk_topk_ef_(grad, err, 4096, True),
        lambda: gck.chunk_topk_ef_(grad, err, value_bits=16.0),
        lambda: gck.random_k_ef_(grad, err, k=65, seed=1),
        lambda: gck.random_k_ef_(grad, err, k=3, seed=-(2**63) - 1),
        lambda: gck.random_k_ef_(grad, err, k=3, seed=True),
        lambda: gck.sign_ef_(grad, err, 48),
        lambda: gck.sign_ef_(grad, err, 256.0),
        lambda: gck.sign_ef_(grad, err, decay=True),
        lambda: gck.quantize_ef_(grad, err, 3),
        lambda: gck.quantize_ef_(grad, err, scale=["max"]),
        lambda: gck.quantize_ef_(grad, err, 2, 256, "stochastic", scale="mean"),
        lambda: gck.quantize_ef_(grad, err, seed=2**63),
        lambda: gck.quantize_ef_(grad, err, seed=True),
        lambda: gck.quantize_ef_(grad, err, seed=0.0),
    ):
        gck.topk_ef_(grad, err, k=1)  # remembered, and no answer for those
        gck.chunk_topk_ef_(grad, err, 4096, 1)
        gck.random_k_ef_(grad, err, k=3, seed=1)
        gck.sign_ef_(grad, err, 256)
        gck.quantize_ef_(grad, err, 2)
        ways.both_refuse(call, err)


# What torch 2.10 says of its first profile.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@needs_table
@variants
def test_watched_calls_take_the_long_way(make: Any, ways: Ways) -> None:
    grad, err = inputs(64)
    payload = ways.short(lambda: make(grad, err))
    assert payload is not None

    def calls() -> None:
        assert ways.short(lambda: make(grad, err)) is None
        assert ways.short(lambda: gck.decompress(payload)) is None

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        calls()
    with Looking() as mode:
        calls()
    assert [name.startswith("gck::") for name in mode.seen].count(True) == 2
    assert ways.short(lambda: make(torch._neg_view(grad), err)) is None
    with torch.no_grad():
        assert ways.short(lambda: make(torch.nn.Parameter(grad), err)) is None
    name = next(name for name in payload._fields if getattr(payload, name).is_floating_point())
    negated = payload._replace(**{name: torch._neg_view(getattr(payload, name))})
    assert ways.short(lambda: gck.decompress(negated)) is None


@variants
def test_other_devices_do_without_the_compiled_module(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not even be there."""
    grad, err = inputs(64)
    payload = make(grad, err)
    elsewhere = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in payload]

    def absent(*_: Any) -> None:
        raise BackendUnavailableError("not built")

    monkeypatch.setattr(direct, "sees_tensors", absent)
    monkeypatch.setattr(direct, "_native", absent)
    direct.maker.cache_clear()
    try:
        assert direct.maker(gck.Sign)(0, grad.to("meta"), err.to("meta"), 256) is None
    finally:
        direct.maker.cache_clear()
    assert direct.decompress(type(payload)(*elsewhere), None, 1.0, False) is None


@variants
def test_without_a_table_of_functions(make: Any, monkeypatch: pytest.MonkeyPatch, ways: Ways) -> None:
    """torch before 2.10."""
    grad, err = inputs(1 << 20)
    other = err.clone()
    expected = make(grad, other)
    dense = gck.decompress(expected)
    monkeypatch.setattr(memory, "sees_tensors", lambda: False)
    monkeypatch.setattr(direct, "sees_tensors", lambda: False)
    direct._native.cache_clear()
    direct.maker.cache_clear()
    try:
        assert ways.short(lambda: gck.decompress(expected)) is None
        assert ways.short(lambda: make(grad, err)) is None
    finally:
        direct._native.cache_clear()
        direct.maker.cache_clear()
    assert torch.equal(err, other)
    assert torch.equal(gck.decompress(expected), dense)


def test_an_unknown_type_has_no_table() -> None:
    native = load()
    assert not native.find_tensors(int)

    class Odd:
        __dlpack_c_exchange_api__ = None

    assert not native.find_tensors(Odd)


@needs_table
def test_declarations_match_torch() -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    include = Path(torch.__file__).parent / "include"
    if compiler is None or not (include / "ATen/dlpack.h").exists():
        pytest.skip("no compiler, or torch without headers")
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    folders = [f"-I{ROOT / 'bindings'}", f"-isystem{include}"]
    done = subprocess.run(
        [compiler, *flags, *folders, str(ROOT / "tests/dlpack_abi.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
