"""Residual decay, clip and statistics: bytes against the oracle, and the oracle against plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.errors import (
    ArgumentError,
    AutogradError,
    DeviceMismatchError,
    DtypeError,
    GckError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.reference import read_residual, statistics, tree
from tests.cases import CASES, GRAD_DTYPES, Guarded, make, raw, same_bytes
from tests.contract import check_case, kernels_of
from tests.ops_calls import pair

COMPRESSORS = [
    gck.TopK(ratio=0.01),
    gck.TopK(ratio=0.1, value_dtype=torch.bfloat16),
    gck.TopK(ratio=0.7, value_dtype=torch.float16),
    gck.TopK(ratio=1.0),
    gck.Sign(32),
    gck.Sign(1024),
    gck.ChunkTopK(k=5, chunk_size=64, value_bits=4),
    gck.ChunkTopK(value_bits=2),
    gck.ChunkTopK(k=333, chunk_size=8192, value_bits=16),
    gck.Quantize(4),
    gck.Quantize(8, 64, "stochastic", seed=-3),
    gck.Quantize(2, 1024, scale="mean"),
    gck.RandomK(ratio=0.01, seed=3),
    gck.RandomK(ratio=0.3, seed=-7, value_dtype=torch.bfloat16),
    gck.RandomK(k=1, seed=2**40, value_dtype=torch.float16),
    gck.RandomK(ratio=1.0, value_dtype=torch.bfloat16, seed=0),
    gck.LowRank(seed=3),
    gck.LowRank(rank=3, columns=70),
]
OPTIONS: list[tuple[float, float | None]] = [(0.9, None), (0.5, 0.3), (1.0, 0.01), (1.0, -1.0), (1.0, None)]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "topk": lambda g, e, **o: gck.topk_ef_(g, e, 0.01, **o),
    "sign": lambda g, e, **o: gck.sign_ef_(g, e, 64, **o),
    "chunk_topk": lambda g, e, **o: gck.chunk_topk_ef_(g, e, 64, 4, value_bits=2, **o),
    "quantize": lambda g, e, **o: gck.quantize_ef_(g, e, 4, 64, "stochastic", 5, **o),
    "random_k": lambda g, e, **o: gck.random_k_ef_(g, e, 0.01, seed=9, **o),
    "low_rank": lambda g, e, **o: gck.low_rank_ef_(g, e, 2, columns=50, seed=9, **o),
}


class Expected(NamedTuple):
    fields: tuple[Tensor, ...]
    err: Tensor
    cleared: int
    stats: Tensor


def oracle(compressor: Any, grad: Tensor, err: Tensor, clip: Tensor | None) -> Expected:
    """What a call with the residual as it is read, and no options, is to leave; and the statistics of it."""
    read = read_residual(compressor, err, clip)
    reference = import_module(f"{type(compressor).__module__}.reference")
    fields, residual, cleared = reference.compress(replace(compressor, decay=1.0, clip=None), grad, read)
    n, sent = grad.numel(), None
    if compressor.name == "topk":
        selected, sent = len(fields[0]), fields
    elif compressor.name == "random_k":
        selected = len(fields[0])
    elif compressor.name == "chunk_topk":
        starts = torch.arange(0, n, compressor.chunk_size)
        selected = int((n - starts).clamp(max=compressor.chunk_size).clamp(max=compressor.k).sum())
    else:
        selected = n
    return Expected(fields, residual, cleared, statistics(grad.float() + read, residual, selected, sent))


def check(
    compressor: Any,
    backend: str,
    grad: Tensor,
    err: Tensor,
    clip: float | None = None,
    hint: int | None = None,
) -> None:
    """Compresses between canaries with all options, and compares every byte with the oracle."""
    kernels, device = kernels_of(backend, compressor)
    limit = None if clip is None else torch.tensor([clip])
    wanted = oracle(compressor, grad, err, limit)
    g, e = Guarded.of(grad.to(device)), Guarded.of(err.to(device))
    layout = compressor.layout(grad.numel())
    body = torch.zeros(1, layout.nbytes, dtype=torch.uint8, device=device)
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    values = Guarded.of(torch.full((5,), math.nan, dtype=torch.float64, device=device))
    options: dict[str, Tensor | None] = {"clip": None if limit is None else limit.to(device)}
    if hint is not None:
        options["hint"] = torch.tensor([hint], dtype=torch.int32, device=device)
    kernels.compress_(compressor, g.inner, e.inner, body, nonfinite, stats=values.inner, **options)
    for got, field in zip(layout.views(body[0]), wanted.fields, strict=True):
        assert same_bytes(got.reshape(-1), field.reshape(-1))
    assert same_bytes(e.inner, wanted.err)
    assert same_bytes(values.inner, wanted.stats)
    assert same_bytes(g.inner, grad)
    assert int(nonfinite) == 5 + wanted.cleared
    assert all(guarded.intact() for guarded in (g, e, values))
    assert limit is None or same_bytes(limit, torch.tensor([clip]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_cpu(compressor: Any, case: str) -> None:
    turn = list(CASES).index(case)
    for i, n in enumerate((1, 511, 512, 2049, 70_001)):
        decay, clip = OPTIONS[(turn + i) % len(OPTIONS)]
        grad, err = make(case, n, GRAD_DTYPES[(turn + i) % 3])
        check(replace(compressor, decay=decay), "cpu", grad, err, clip)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_interpreter(compressor: Any) -> None:
    for i, (case, n) in enumerate((("nonfinite", 513), ("few nonfinite", 5001), ("huge", 1))):
        decay, clip = OPTIONS[i]
        check(replace(compressor, decay=decay), "interpreter", *make(case, n, GRAD_DTYPES[i]), clip)


@pytest.mark.slow
def test_top_k_by_a_list_in_the_interpreter() -> None:
    """So long that a threshold is guessed, and with a sum of more than one level in three rows."""
    check(gck.TopK(ratio=0.01, decay=0.9), "interpreter", *make("gaussian", 270_001, torch.bfloat16), 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_cuda(compressor: Any) -> None:
    for i, case in enumerate(CASES):
        for j, n in enumerate((1, 513, 70_001, 1_000_003)):
            decay, clip = OPTIONS[(i + j) % len(OPTIONS)]
            grad, err = make(case, n, GRAD_DTYPES[i % 3])
            check(replace(compressor, decay=decay), "cuda", grad, err, clip)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_thread_count_changes_nothing(compressor: Any) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            grad, err = make("few nonfinite", 300_007, torch.bfloat16)
            check(replace(compressor, decay=0.9), "cpu", grad, err, 0.3)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(
    compressor=st.sampled_from(COMPRESSORS),
    case=st.sampled_from(list(CASES)),
    dtype=st.sampled_from(GRAD_DTYPES),
    n=st.integers(1, 3000),
    decay=st.floats(0, 1, exclude_min=True, width=32),
    clip=st.one_of(st.none(), st.sampled_from([0.0, -0.0, math.nan, math.inf, 1e-42]), st.floats(width=32)),
)
def test_any_options(
    compressor: Any, case: str, dtype: torch.dtype, n: int, decay: float, clip: float | None
) -> None:
    check(replace(compressor, decay=decay), "cpu", *make(case, n, dtype), clip)


@pytest.mark.parametrize("n", [100_000, 400_003])
@pytest.mark.parametrize("hint", [0x7F7FFFFF, 0x7F800000, 1, 0x3F800000])
def test_top_k_survives_a_wrong_guess(n: int, hint: int) -> None:
    """Too high a guess, and a list that overflows: all is put back, and what was read once is not read
    again, so that the residual decays once."""
    for compressor in (gck.TopK(ratio=0.01, decay=0.5), gck.TopK(ratio=0.2, decay=0.5, clip=0.25)):
        for dtype in (torch.float32, torch.bfloat16):
            some = replace(compressor, value_dtype=dtype)
            check(some, "cpu", *make("gaussian", n, torch.float32), compressor.clip, hint)


@pytest.mark.parametrize("hint", [0x7F7FFFFF, 1])
def test_top_k_survives_a_wrong_guess_in_the_interpreter(hint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    from tests.kernels.topk_paths import shrink

    shrink(monkeypatch, capacity=300)
    monkeypatch.setattr(import_module("gck.kernels.topk.gpu"), "TILE", 512)
    check(gck.TopK(ratio=0.05, decay=0.5), "interpreter", *make("gaussian", 5001, torch.float32), 0.5, hint)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_the_messages_are_those_of_a_residual_that_decays_as_it_is_written(compressor: Any) -> None:
    """Bit for bit, step for step, beside a loop that does not know of reading."""
    reference = import_module(f"{type(compressor).__module__}.reference")
    n, decay, clip = 3000, 0.7, 0.4
    ours, theirs = torch.zeros(n), torch.zeros(n)
    for step in range(6):
        grad = make("gaussian", n + step, torch.float32)[0][:n]
        if step == 3:
            grad[17] = math.inf
        fields, left, _ = reference.compress(compressor, grad, theirs)
        theirs = (left * torch.tensor(decay)).clamp(-clip, clip)
        layout = compressor.layout(n)
        body = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
        replace(compressor, decay=decay, clip=clip).compress_(grad, ours, body)
        for got, wanted in zip(layout.views(body[0]), fields, strict=True):
            assert same_bytes(got.reshape(-1), wanted.reshape(-1)), step
        assert same_bytes(ours, left), step


def test_a_residual_is_read_as_torch_would() -> None:
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3e38, math.inf, -math.inf, math.nan, 0.3, -0.3]
    err = torch.tensor(special)
    for decay in (1.0, 0.3, 1e-30):
        scaled = err * torch.tensor(decay)
        assert same_bytes(read_residual(gck.Sign(decay=decay), err), scaled)
        for clip in (0.25, 1e-42, math.inf):
            read = read_residual(gck.Sign(decay=decay, clip=clip), err)
            assert same_bytes(read, scaled.clamp(-torch.tensor(clip), torch.tensor(clip)))
    for clip in (0.0, -0.0, -1.0, math.nan):
        read = read_residual(gck.Sign(), err, torch.tensor(clip))
        assert torch.equal(read[:9], torch.zeros(9))
        assert torch.equal(read.signbit(), err.signbit())
        assert math.isnan(read[9])


@pytest.mark.parametrize("case", ["gaussian", "huge", "denormal", "few nonfinite", "all equal", "outlier"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_statistics_are_those_of_exact_sums(name: str, case: str) -> None:
    """fsum rounds once. A tree of L levels of nine additions each adds a number at most 9 L times, each
    addition to within 2**-53 of its result; squares and magnitudes of fp32 are exact. What was sent of acc_sq
    in top-k is such a sum of numbers that round once more, and so is the difference."""
    n = 300_007
    grad, err = make(case, n, torch.float32)
    acc, stats = grad + err, gck.Statistics.empty()
    payload = FUNCTIONS[name](grad, err, stats=stats)
    finite = torch.where(acc.isfinite(), acc, 0.0).double().tolist()
    bound = 9 * 3 * 2.0**-53 * (1 + 2.0**-40)
    l1, sq = math.fsum(map(abs, finite)), math.fsum(x * x for x in finite)
    left = math.fsum(x * x for x in err.double().tolist())
    assert abs(float(stats.acc_l1) - l1) <= bound * l1
    assert abs(float(stats.acc_sq) - sq) <= bound * sq
    allowed = (2 * bound + 2.0**-51) * sq if name == "topk" else bound * left
    assert abs(float(stats.err_sq) - left) <= allowed
    assert int(stats.nonfinite) == int((~acc.isfinite()).sum())
    selected = {"topk": 3001, "random_k": 3001, "chunk_topk": (n // 64) * 4 + 4}.get(name, n)
    assert int(stats.selected) == selected
    assert payload.numel == n
    density = float(stats.density(n))
    assert math.isclose(density, l1 * l1 / (n * sq) if sq else 0.0, rel_tol=1e-14)


@pytest.mark.parametrize("chunk_size", [32, 256])
def test_lemma_8_of_ef_sign_sgd(chunk_size: int) -> None:
    """With one chunk for all: what is left is (1 - density) of what was there, to rounding."""
    for case in ("gaussian", "clustered", "all equal", "sorted"):
        grad, err = make(case, chunk_size, torch.float32)
        stats = gck.Statistics.empty()
        gck.sign_ef_(grad, err, chunk_size, stats=stats)
        wanted = (1 - stats.density(chunk_size)) * stats.acc_sq
        assert abs(float(stats.err_sq - wanted)) <= 1e-5 * float(stats.acc_sq), case


def test_the_tree_of_a_few_numbers() -> None:
    """Larger neighbours swallow 1.0 unless the tree adds 1.0 to 1.0 first."""
    x = torch.zeros(1024, dtype=torch.float64)
    x[0], x[256], x[1], x[512] = 1.0, 1.0, 2.0**54, 1.0
    # Of the first block (1 + 1) + 2**54; of the second 1, which is lost.
    assert float(tree(x)) == 2.0**54 + 2
    x[256], x[128] = 0.0, -(2.0**54)
    assert float(tree(x)) == 1.0 + 0.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_options_nothing_changes(name: str) -> None:
    grad, err = pair(5000)
    plain, neutral = err.clone(), err.clone()
    stats = gck.Statistics.empty()
    wanted = FUNCTIONS[name](grad, plain)
    got = FUNCTIONS[name](grad, neutral, decay=1.0, clip=math.inf, stats=stats)
    assert all(same_bytes(a, b) for a, b in zip(got.fields, wanted.fields, strict=True))
    assert same_bytes(neutral, plain)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions(name: str) -> None:
    """Numbers, tensors and NumPy arrays; the empty vector; an operator on its own."""
    grad, err = pair(5000)
    results = []
    for clip in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        for array in (False, True):
            e, stats = err.clone(), gck.Statistics.empty()
            g = grad.numpy() if array else grad
            payload = FUNCTIONS[name](g, e.numpy() if array else e, decay=0.5, clip=clip, stats=stats)
            results.append([raw(x) for x in (*payload.fields, e, stats.values)])
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    plain = err.clone()
    FUNCTIONS[name](grad, plain)
    assert not torch.equal(raw(plain), results[0][-2])
    stats = gck.Statistics(torch.full((5,), math.nan, dtype=torch.float64))
    FUNCTIONS[name](torch.empty(0), torch.empty(0), decay=0.5, stats=stats)
    assert stats.values.tolist() == [0.0] * 5
    assert float(stats.density(0)) == 0.0


BAD: dict[str, tuple[type[GckError], str, dict[str, Any]]] = {
    "no decay": (ArgumentError, r"decay must be in \(0, 1\], got 0", {"decay": 0}),
    "growth": (ArgumentError, r"decay must be in \(0, 1\], got 1.5", {"decay": 1.5}),
    "nan": (ArgumentError, r"decay must be in \(0, 1\], got nan", {"decay": math.nan}),
    "decay type": (DtypeError, r"decay must be a number, got '1' \(str\)", {"decay": "1"}),
    "clip": (ArgumentError, r"clip must be above 0, got -0\.5", {"clip": -0.5}),
    "clip nan": (ArgumentError, "clip must be above 0, got nan", {"clip": math.nan}),
    "clip type": (DtypeError, r"clip must be a number or a tensor, got '1' \(str\)", {"clip": "1"}),
    "clip dtype": (DtypeError, r"clip must be float32, got torch\.float64", {"clip": torch.ones(1).double()}),
    "clip size": (
        ShapeMismatchError,
        r"clip must have one element, got shape \(2,\)",
        {"clip": torch.ones(2)},
    ),
    "clip device": (DeviceMismatchError, "clip must be on", {"clip": torch.ones(1, device="meta")}),
    "clip recorded": (AutogradError, "clip requires grad", {"clip": torch.ones(1, requires_grad=True)}),
    "stats type": (
        DtypeError,
        r"stats must be a gck.Statistics, got a tensor of shape \(5,\), torch.float32, cpu",
        {"stats": torch.zeros(5)},
    ),
    "stats dtype": (DtypeError, "stats must be float64", {"stats": gck.Statistics(torch.zeros(5))}),
    "stats size": (
        ShapeMismatchError,
        r"stats must have 5 elements, got shape \(4,\)",
        {"stats": gck.Statistics(torch.zeros(4).double())},
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_options_change_nothing(name: str, bad: str) -> None:
    error, text, options = BAD[bad]
    grad, err = pair(300)
    before = err.clone()
    with pytest.raises(error, match=f"^{name}_ef_: .*{text}"):
        FUNCTIONS[name](grad, err, **options)
    assert same_bytes(err, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_overlap_changes_nothing(name: str) -> None:
    memory = torch.arange(600.0)
    before = memory.clone()
    for options in ({"clip": memory[5:6]}, {"stats": gck.Statistics(memory[300:310].view(torch.float64))}):
        with pytest.raises(LayoutError, match="overlap in memory"):
            FUNCTIONS[name](torch.ones(500), memory[:500], **options)
    assert torch.equal(memory, before)


def test_lists_take_no_statistics() -> None:
    grad, err = pair(300)
    for flat in (False, True):
        with pytest.raises(ArgumentError, match="topk_ef_: stats are of single tensors, got Statistics"):
            gck.topk_ef_([grad], [err], 0.1, flat=flat, stats=gck.Statistics.empty())  # type: ignore[call-overload]
    assert torch.equal(err, pair(300)[1])


def test_compressors_with_options() -> None:
    for make_one in (gck.TopK, gck.Sign, gck.ChunkTopK, gck.Quantize):
        name = make_one.__name__
        needed: dict[str, Any] = {"k": 1} if make_one is gck.TopK else {}
        assert make_one(decay=0.5, **needed) != make_one(**needed)
        for options, error in (({"decay": 2.0}, ArgumentError), ({"clip": 0.0}, ArgumentError)):
            with pytest.raises(error, match=f"^{name}: "):
                make_one(**options, **needed)
        with pytest.raises(DtypeError, match=f"^{name}: clip must be a number"):
            make_one(clip="1", **needed)
        with pytest.raises(DtypeError, match=f"^{name}: clip must be a number; functions take tensors, too"):
            make_one(clip=torch.ones(()), **needed)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.shard_unit], ids=str)
def test_shards(compressor: Any, shards: int) -> None:
    some = replace(compressor, decay=0.5, clip=0.25)
    for n in (100, 5000, 70_001):
        check_case(some, "cpu", *make("few nonfinite", n, torch.float32), shards=shards)
