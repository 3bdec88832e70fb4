"""The functional API in company: arrays of other libraries, tracing and compiling, autograd, profiles."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import gck
from gck.errors import (
    AutogradError,
    DtypeError,
    LayoutError,
)
from tests.cases import same_bytes
from tests.ops_calls import FUNCTIONS, pair
from tests.versions import needs_dynamic_rows


class TestArrays:
    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_numpy_in_place(self, function: str) -> None:
        grad, err = pair()
        wanted_err = err.clone()
        wanted = FUNCTIONS[function](grad, wanted_err)
        array = err.numpy().copy()
        payload = FUNCTIONS[function](grad.numpy(), array)
        assert all(same_bytes(a, b) for a, b in zip(payload.fields, wanted.fields, strict=True))
        assert np.array_equal(array, wanted_err.numpy())

    def test_dlpack(self) -> None:
        class Foreign:
            """Speaks DLPack and nothing else."""

            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

            def __dlpack__(self, **options: Any) -> Any:
                return self.tensor.__dlpack__(**options)

            def __dlpack_device__(self) -> Any:
                return self.tensor.__dlpack_device__()

        grad, err = pair()
        wanted_err = err.clone()
        wanted = gck.topk_ef_(grad, wanted_err, 0.01)
        payload = gck.topk_ef_(Foreign(grad), Foreign(err), 0.01)
        assert same_bytes(payload.values, wanted.values)
        assert same_bytes(err, wanted_err)

    def test_read_only_and_out(self) -> None:
        grad, err = (x.numpy().copy() for x in pair())
        grad.flags.writeable = False
        payload = gck.topk_ef_(grad, err, 0.01)
        out = np.zeros(1000, dtype=np.float32)
        gck.decompress_add_(out, payload)
        assert np.count_nonzero(out) == 10
        err.flags.writeable = False
        with pytest.raises(LayoutError, match="err is a read-only array"):
            gck.topk_ef_(grad, err, 0.01)

    def test_not_an_array(self) -> None:
        with pytest.raises(
            DtypeError, match=r"topk_ef_: grad must be a tensor or an array .* got 1.0 \(float\)"
        ):
            gck.topk_ef_(1.0, torch.ones(1), 0.5)  # type: ignore[call-overload]
        with pytest.raises(DtypeError, match="grad"):
            gck.sign_ef_(np.array(["a"]), torch.ones(1))
        with pytest.raises(DtypeError, match=r"err must be float32, got torch\.float64"):
            gck.topk_ef_(np.ones(4, dtype=np.float32), np.ones(4), k=1)


def test_opcheck() -> None:
    grad, err = pair(200)
    counter = torch.zeros(1, dtype=torch.int64)
    ops = torch.ops.gck
    opcheck(ops.topk_ef_, (grad, err, 10, torch.float32, None))
    opcheck(ops.topk_ef_, (grad, err, 10, torch.bfloat16, counter))
    opcheck(ops.topk, (grad, 10, torch.float32))
    opcheck(ops.sign_ef_, (grad, err, 64, counter))
    opcheck(ops.chunk_topk_ef_, (grad, err, 64, 5, 4, counter))
    opcheck(ops.chunk_topk_ef_, (grad, err, 64, 5, 16, None))
    opcheck(ops.chunk_topk, (grad, 64, 5, 2))
    opcheck(ops.quantize_ef_, (grad, err, 4, 64, "stochastic", -9, "max", counter))
    opcheck(ops.quantize_ef_, (grad, err, 2, 64, "nearest", 0, "mean", None))
    options = {"decay": 0.5, "clip": torch.tensor([0.3]), "stats": torch.zeros(5, dtype=torch.float64)}
    opcheck(ops.topk_ef_, (grad, err, 10, torch.float32, None), options)
    opcheck(ops.sign_ef_, (grad, err, 64, None), options)
    opcheck(ops.chunk_topk_ef_, (grad, err, 64, 5, 16, counter), options)
    opcheck(ops.quantize_ef_, (grad, err, 4, 64, "nearest", 0, "max", None), options)
    opcheck(ops.quantize, (grad, 8, 32, "nearest", 0, "max"))
    opcheck(ops.random_k_ef_, (grad, err, 10, -9, torch.float32, counter))
    opcheck(ops.random_k_ef_, (grad, err, 10, 2**40, torch.float16, None))
    opcheck(ops.random_k, (grad, 10, 3, torch.bfloat16))
    opcheck(ops.low_rank_ef_, (grad, err, 3, 21, -9, counter))
    opcheck(ops.low_rank_ef_, (grad, err, 64, 2**31 - 1, 2**40, None), options)
    opcheck(ops.low_rank, (grad, 4, 10, 3))
    sparse, signs, chunks = gck.topk(grad, k=3), gck.sign_ef_(grad, err, 64), gck.chunk_topk(grad, 64, 5)
    levels, seeded = gck.quantize(grad, 2, 64, scale="mean"), gck.random_k(grad, k=3, seed=-4)
    factors = gck.low_rank(grad, 3, columns=21, seed=-4)
    for payload, options in (
        (sparse, []),
        (signs, [64]),
        (chunks, [64, 5, 16]),
        (levels, [2, 64, 1]),
        (seeded, [-4]),
        (factors, [21]),
    ):
        fields = [field.clone() for field in payload.fields]
        opcheck(ops.decompress_, (grad.clone(), payload.compressor, fields, options, 2.0, True))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
@pytest.mark.filterwarnings("ignore")  # inductor warns of its own inner life
def test_compile_without_a_graph_break(backend: str, dynamic: bool) -> None:
    def step(grad: torch.Tensor, err: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sparse = gck.topk_ef_(grad * 2, err, 0.01, value_dtype=torch.bfloat16)
        signs = gck.sign_ef_(grad, err, 64)
        chunks = gck.chunk_topk_ef_(grad, err, 64, 5, value_bits=4)
        codes = gck.quantize_ef_(grad, err, 4, 64, "stochastic", 3)
        seeded = gck.random_k_ef_(grad, err, 0.1, seed=grad.numel())
        factors = gck.low_rank_ef_(grad, err, 3, seed=grad.numel())
        out = gck.decompress_add_(gck.decompress_add_(gck.decompress(sparse), chunks), codes)
        gck.decompress_add_(gck.decompress_add_(out, signs, 0.5), seeded)
        gck.decompress_add_(out, factors)
        return (
            out,
            sparse.values,
            sparse.indices,
            signs.words,
            chunks.values,
            chunks.scales,
            chunks.indices,
            codes.codes,
            seeded.values,
            factors.left,
            factors.right,
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (1000, 2049):
        grad, err = pair(n)
        compiled_err = err.clone()
        wanted = step(grad, err)
        got = compiled(grad, compiled_err)
        assert all(same_bytes(a, b) for a, b in zip(got, wanted, strict=True))
        assert same_bytes(compiled_err, err)


@needs_dynamic_rows
@pytest.mark.parametrize("columns", [None, 7])
def test_rows_of_a_matrix_may_change_without_compiling_again(columns: int | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(grad: torch.Tensor, err: torch.Tensor) -> torch.Tensor:
        return gck.decompress(gck.low_rank_ef_(grad, err, 3, columns=columns, seed=1))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (100, 120, 130, 150, 200):
        grad, err = pair(10 * rows)
        grad = grad.view(rows, 10)
        wanted = step(grad, err.clone())
        assert torch.equal(compiled(grad, err), wanted)
    assert counter.frame_count <= 2


def test_options_compile_without_a_graph_break() -> None:
    def step(grad: torch.Tensor, err: torch.Tensor, stats: gck.Statistics) -> tuple[torch.Tensor, ...]:
        sparse = gck.topk_ef_(grad, err, 0.01, decay=0.5, clip=0.25, stats=stats)
        signs = gck.sign_ef_(grad, err, 64, decay=0.9, clip=torch.full((1,), 0.5))
        return sparse.values, signs.words, stats.density(grad.numel())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad, err = pair(1000)
    compiled_err, stats, compiled_stats = err.clone(), gck.Statistics.empty(), gck.Statistics.empty()
    wanted = step(grad, err, stats)
    got = compiled(grad, compiled_err, compiled_stats)
    assert all(same_bytes(a, b) for a, b in zip(got, wanted, strict=True))
    assert same_bytes(compiled_err, err)
    assert same_bytes(compiled_stats.values, stats.values)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 5)])
def test_factors_of_any_shape_decode_while_compiled(shape: tuple[int, int]) -> None:
    def step(grad: torch.Tensor, err: torch.Tensor) -> torch.Tensor:
        return gck.decompress(gck.low_rank_ef_(grad, err, 2, seed=3))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert same_bytes(compiled(grad, torch.zeros(grad.numel())), step(grad, torch.zeros(grad.numel())))


def test_autograd_notices_the_mutation() -> None:
    err = torch.ones(64)
    x = torch.ones(64, requires_grad=True)
    y = (x * err).sum()
    gck.sign_ef_(torch.ones(64), err)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_k_may_change_while_compiled() -> None:
    step = torch.compile(lambda g, e, k: gck.topk_ef_(g, e, k=k).indices, fullgraph=True, backend="aot_eager")
    grad, _ = pair(300)
    for k in (3, 5, 7):
        wanted = gck.topk(grad, k=k).indices
        assert torch.equal(step(grad, torch.zeros(300), k), wanted)


def test_the_seed_may_change_while_compiled() -> None:
    step = torch.compile(
        lambda g, e, seed: gck.quantize_ef_(g, e, 4, 64, "stochastic", seed).codes,
        fullgraph=True,
        backend="aot_eager",
    )
    grad, _ = pair(300)
    for seed in (3, 5, 2**40, -1, -7, 12):
        wanted = gck.quantize_ef_(grad, torch.zeros(300), 4, 64, "stochastic", seed).codes
        assert torch.equal(step(grad, torch.zeros(300), seed), wanted)


def test_the_seed_of_a_choice_may_change_without_compiling_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(grad: torch.Tensor, err: torch.Tensor, seed: int) -> torch.Tensor:
        out = gck.decompress(gck.random_k_ef_(grad, err, 0.1, seed=seed))
        return gck.decompress_add_(out, gck.low_rank_ef_(grad, err, 2, seed=seed))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    grad, err = pair(300)
    for seed in (3, 5, 7, 2**40, 12):
        wanted = step(grad, err.clone(), seed)
        assert torch.equal(compiled(grad, err.clone(), seed), wanted)
    assert counter.frame_count <= 2  # for the first seed, and for any


# What torch 2.10 says of its first profile.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_eager_calls_show_in_a_profile_and_negated_views_are_negated() -> None:
    grad, _ = pair(300)
    with torch.profiler.profile() as profile:
        gck.topk(grad, k=3)
    assert "gck::topk" in {event.key for event in profile.key_averages()}
    assert same_bytes(gck.topk(torch._neg_view(grad), k=3).values, gck.topk(-grad, k=3).values)


@pytest.mark.parametrize(
    "function", [*FUNCTIONS, "topk_ef_ of a list", "topk", "low_rank", "decompress", "decompress_add_"]
)
def test_jit_trace_is_refused(function: str) -> None:
    """It would record a result of any content."""
    grad, err = pair()
    payload = gck.topk_ef_(*pair(), k=5)
    calls = FUNCTIONS | {
        "topk_ef_ of a list": lambda g, e: gck.topk_ef_([g], [e], 0.01, flat=True),
        "topk": lambda g, e: gck.topk(g, k=5),
        "random_k": lambda g, e: gck.random_k(g, k=5, seed=1),
        "low_rank": lambda g, e: gck.low_rank(g, 2, seed=1),
        "decompress": lambda g, e: gck.decompress(payload),
        "decompress_add_": lambda g, e: gck.decompress_add_(e, payload),
    }

    def step(grad: torch.Tensor, err: torch.Tensor) -> torch.Tensor:
        with pytest.raises(AutogradError, match=r"torch\.jit\.trace cannot record it"):
            calls[function](grad, err)
        return grad

    before = err.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        torch.jit.trace(step, (grad, err), check_trace=False)
    assert torch.equal(err, before)
    calls[function](grad, err)
