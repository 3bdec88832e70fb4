"""Packed payloads to the packed payload of their sum: in one pass, the bytes of the oracles in turn."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.compressor import reduce_, reduce_by_steps_, server_of
from gck.errors import (
    ArgumentError,
    CorruptPayloadError,
    DeviceMismatchError,
    DtypeError,
    GckError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.common.reduction import Reduction
from tests.cases import CASES, Guarded, make, one_nan, same_bytes
from tests.kernels.bits import bit_patterns
from tests.kernels.launches import recorded
from tests.kernels.test_gpu import synchronisation_is_an_error

TOPK = gck.ChunkTopK(k=5, chunk_size=32, value_bits=4)
PACKED = [
    gck.Sign(32),
    gck.Sign(),
    gck.Sign(8192),
    gck.Quantize(8),
    gck.Quantize(4, 32),
    gck.Quantize(4, 64, "stochastic", seed=-3),
    gck.Quantize(2, 128, "stochastic", seed=2**40, first=7 << 33),
    gck.Quantize(2),
    gck.Quantize(2, 8192, scale="mean"),
    gck.Quantize(2, 32, scale="mean"),
]
TOPKS = [
    TOPK,
    gck.ChunkTopK(),
    gck.ChunkTopK(k=7, chunk_size=128, value_bits=2),
    gck.ChunkTopK(k=16, chunk_size=32, value_bits=8, index_bits=16),
    gck.ChunkTopK(k=4, chunk_size=64, value_bits=32, server_k=16),
    gck.ChunkTopK(k=100, chunk_size=8192, value_bits=2, server_k=400),
]
COMPRESSORS = [*PACKED, *TOPKS]
# More entries than a program's threads take together.
MANY = gck.ChunkTopK(k=600, chunk_size=2048, value_bits=8, server_k=8)


def reference(compressor: Any) -> Any:
    return import_module(f"{compressor.package}.reference")


def payloads(compressor: Any, ranks: int, n: int, capacity: int, case: str = "gaussian") -> Tensor:
    """(ranks, nbytes) bodies of vectors of n elements, laid out for `capacity`, of the oracle."""
    layout = compressor.layout(capacity)
    memory = torch.zeros(ranks, layout.nbytes + 32, dtype=torch.uint8)
    for rank, row in enumerate(memory):
        grad, err = make(case, n + rank % 3, torch.float32)
        grad, err = grad[:n] * (1 + rank % 7) - rank % 2, err[:n]
        fields, _, _ = reference(compressor).compress(compressor, grad, err)
        for view, field in zip(layout.views(row[: layout.nbytes]), fields, strict=True):
            view[: field.numel()] = field
    return memory[:, : layout.nbytes]


def oracle(
    compressor: Any, bodies: Tensor, capacity: int, err: Tensor, divisor: int
) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """(fields, new residual, cleared): decode and add one after the other, divide, compress."""
    n, layout = err.numel(), compressor.layout(capacity)
    total = torch.zeros(n)
    for body in bodies:
        fields = layout.views(body)
        if compressor.name == "chunk_topk":  # its oracle decodes exactly what it is given
            rows = compressor.chunks(n), compressor.row
            fields = tuple(f[: rows[0] * count] for f, count in zip(fields, rows[1], strict=True))
        elif compressor.name == "sign":
            fields = tuple(
                f[: -(-n // size)] for f, size in zip(fields, (32, compressor.chunk_size), strict=True)
            )
        total = total + reference(compressor).decompress(compressor, fields, n)
    total = total / divisor
    server = server_of(compressor, bodies.shape[0])
    return reference(server).compress(server, total, err)


def kernels_of(compressor: Any, backend: str) -> Any:
    if backend == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module(f"{compressor.package}.{'cpu' if backend == 'cpu' else 'gpu'}")


def check(
    compressor: Any,
    backend: str,
    bodies: Tensor,
    n: int,
    capacity: int,
    err: Tensor | None,
    divisor: int,
) -> None:
    """Every byte of the body, the residual and the counter, between canaries."""
    device = "cuda" if backend == "cuda" else "cpu"
    wanted, new_err, cleared = oracle(
        compressor, bodies, capacity, torch.full((n,), -0.0) if err is None else err, divisor
    )
    server = server_of(compressor, bodies.shape[0])
    out_layout = server.layout(n)
    memory = torch.full((out_layout.nbytes + 48,), 0xA5, dtype=torch.uint8, device=device)
    body = memory[16 : 16 + out_layout.nbytes]
    body.zero_()
    held = None if err is None else Guarded.of(err.to(device))
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    rows = torch.empty_strided(bodies.shape, bodies.stride(), dtype=torch.uint8, device=device)
    rows.copy_(bodies)
    inner = None if held is None else held.inner
    if backend == "interpreter":  # its tensors are on the CPU, of which reduce_ would take the kernels
        job = Reduction(rows, compressor.layout(capacity), n, divisor, server, inner, body, nonfinite)
        kernels_of(compressor, backend).reduce_(compressor, job)
    else:
        compressor.reduce_(rows, inner, body, n, capacity=capacity, divisor=divisor, nonfinite=nonfinite)
    for got, field in zip(out_layout.views(body), wanted, strict=True):
        assert same_bytes(got, field)
    assert int(nonfinite) == 5 + cleared
    if held is not None:
        assert same_bytes(held.inner, new_err)
        assert held.intact()
    assert (memory[:16] == 0xA5).all()
    assert (memory[16 + out_layout.nbytes :] == 0xA5).all()
    assert torch.equal(rows.cpu(), bodies)


def residual(n: int, case: str = "gaussian") -> Tensor:
    return make(case, n, torch.float32)[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_ranks(compressor: Any, ranks: int) -> None:
    for n in (1, 33, 4999):
        bodies = payloads(compressor, ranks, n, n)
        check(compressor, "cpu", bodies, n, n, residual(n), 1)
        check(compressor, "cpu", bodies, n, n, residual(n), ranks)


@pytest.mark.parametrize("ranks", [64, 1024])
@pytest.mark.parametrize(
    "compressor", [gck.Sign(), gck.Quantize(4), gck.Quantize(2, scale="mean"), TOPK], ids=str
)
def test_many_ranks(compressor: Any, ranks: int) -> None:
    n = 2 * compressor.chunk_size + 7
    bodies = payloads(compressor, 7, n, n).repeat(-(-ranks // 7), 1)[:ranks]
    check(compressor, "cpu", bodies, n, n, residual(n), ranks)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_values(compressor: Any, case: str) -> None:
    n = min(2 * compressor.chunk_size, 8192) + 65
    bodies = payloads(compressor, 3, n, n, case)
    for err in (residual(n, case), None):
        check(compressor, "cpu", bodies, n, n, err, 3)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_bodies_laid_out_for_more(compressor: Any) -> None:
    """The last shard of a vector, cut short by its end; the residual is whole chunks, or not."""
    size = compressor.chunk_size
    capacity = 4 * size
    for n in (1, size - 1, size, size + 1, 3 * size + 31, capacity):
        bodies = payloads(compressor, 2, n, capacity)
        check(compressor, "cpu", bodies, n, capacity, residual(n), 2)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_thread_count_changes_nothing(compressor: Any) -> None:
    n, before = 140_001, torch.get_num_threads()
    bodies = payloads(compressor, 2, n, n)
    wanted: list[Tensor] = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            err, body = residual(n), torch.zeros(server_of(compressor, 2).layout(n).nbytes, dtype=torch.uint8)
            compressor.reduce_(bodies, err, body, n, divisor=2)
            wanted = wanted or [err, body]
            assert same_bytes(err, wanted[0])
            assert same_bytes(body, wanted[1])
        check(compressor, "cpu", bodies, n, n, residual(n), 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compressor", PACKED, ids=str)
def test_random_bits(compressor: Any) -> None:
    """Codes and scales that no compressor makes: of any bits, NaN and infinities among the scales."""
    n = 3 * compressor.chunk_size + 5
    layout = compressor.layout(n)
    bodies = torch.zeros(3, layout.nbytes, dtype=torch.uint8)
    for rank, body in enumerate(bodies):
        codes, scales = layout.views(body)
        bits = bit_patterns(n, rank).view(torch.uint8)
        codes.view(torch.uint8).copy_(bits[: codes.nbytes])
        scales.copy_(bit_patterns(scales.numel(), 10 + rank))
    check(compressor, "cpu", bodies, n, n, bit_patterns(n, 20), 3)


@settings(max_examples=100, deadline=None)
@given(
    compressor=st.sampled_from([c for c in COMPRESSORS if c.chunk_size <= 256]),
    cases=st.tuples(st.sampled_from(list(CASES)), st.sampled_from(list(CASES))),
    ranks=st.integers(1, 20),
    n=st.integers(1, 1500),
    more=st.integers(0, 700),
    mean=st.booleans(),
    has_residual=st.booleans(),
)
def test_any_reduction(
    compressor: Any,
    cases: tuple[str, str],
    ranks: int,
    n: int,
    more: int,
    mean: bool,
    has_residual: bool,
) -> None:
    bodies = payloads(compressor, ranks, n, n + more, cases[0])
    err = residual(n, cases[1]) if has_residual else None
    check(compressor, "cpu", bodies, n, n + more, err, ranks if mean else 1)


@pytest.mark.parametrize(
    ("compressor", "ranks"),
    [
        *((compressor, ranks) for compressor in PACKED for ranks in (1, 3, 8)),
        *((compressor, ranks) for compressor in TOPKS for ranks in (3, 9)),
        (TOPK, 1),
        (MANY, 2),
    ],
    ids=str,
)
def test_interpreter(compressor: Any, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One program makes several groups of chunks, one after the other.
    monkeypatch.setattr("gck.kernels.common.launch.INTERPRETED_PROGRAMS", 2)
    group = 512 if compressor.name == "chunk_topk" else 1024
    n = 2 * max(compressor.chunk_size, group) + 33
    for err, divisor, capacity in ((residual(n), 1, n), (None, ranks, n), (residual(n), ranks, n + 1000)):
        bodies = payloads(compressor, ranks, n, capacity)
        check(compressor, "interpreter", bodies, n, capacity, err, divisor)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_values_in_the_interpreter(compressor: Any) -> None:
    n = min(2 * compressor.chunk_size, 1024 if compressor in PACKED else 512) + 65
    for case in ("few nonfinite", "denormal", "huge", "minus zero"):
        check(compressor, "interpreter", payloads(compressor, 2, n, n, case), n, n, residual(n, case), 2)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("chunk_size", [32, 256, 8192])
def test_the_sum_of_signs_is_that_of_one_after_the_other(
    chunk_size: int, backend: str, accumulate: bool
) -> None:
    compressor = gck.Sign(chunk_size)
    n, ranks = 8192 + 4096 + 33, 5
    layout, bodies = compressor.layout(n), payloads(compressor, ranks, n, n, "few nonfinite")
    base = torch.linspace(-1, 1, n)
    out, wanted = Guarded.of(base), base.clone() if accumulate else torch.zeros(n)
    kernels_of(compressor, backend).decompress_sum_(compressor, out.inner, bodies, layout, 0.3, accumulate)
    for body in bodies:
        wanted += torch.tensor(0.3) * reference(compressor).decompress(compressor, layout.views(body), n)
    assert same_bytes(one_nan(out.inner), one_nan(wanted))
    assert out.intact()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_cuda(compressor: Any, ranks: int) -> None:
    for n, more in ((33, 0), (70_001, 0), (70_001, 9000)):
        bodies = payloads(compressor, ranks, n, n + more, "few nonfinite")
        for err, divisor in ((residual(n), ranks), (None, 1)):
            check(compressor, "cuda", bodies, n, n + more, err, divisor)


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", TOPKS, ids=str)
def test_cuda_several_groups_a_program(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program leaves of one group in its scratch is not in the next one's sum."""
    for module in ("gpu_reduce", "gpu_decode"):
        monkeypatch.setattr(f"gck.kernels.chunk_topk.{module}.looping", lambda tensor, each: 3)
    n = 70_001
    bodies = payloads(compressor, 9, n, n, "few nonfinite")
    for err in (residual(n), None):
        check(compressor, "cuda", bodies, n, n, err, 9)
    layout, wanted, out = compressor.layout(n), torch.zeros(n), Guarded.of(torch.full((n,), -7.0).cuda())
    compressor.decompress_sum("test", out.inner, bodies.cuda(), layout, 1.0, False)
    for body in bodies:
        wanted += reference(compressor).decompress(compressor, layout.views(body), n)
    assert same_bytes(one_nan(out.inner), one_nan(wanted))
    assert out.intact()


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_no_host_synchronisation(compressor: Any) -> None:
    n = 70_001
    bodies, err = payloads(compressor, 3, n, n).cuda(), residual(n).cuda()
    body = torch.zeros(server_of(compressor, 3).layout(n).nbytes, dtype=torch.uint8, device="cuda")
    compressor.reduce_(bodies, err, body, n, divisor=3)  # compiles
    with synchronisation_is_an_error():
        compressor.reduce_(bodies, err, body, n, divisor=3)


@pytest.mark.parametrize("compressor", [*PACKED, TOPK], ids=str)
def test_launches_do_not_depend_on_values(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grid and options for any values, and contraction pinned off; one kernel."""
    kernels, n = kernels_of(compressor, "interpreter"), 700
    runs = []
    for case in ("gaussian", "all nan", "all zero"):
        bodies, err = payloads(compressor, 2, n, n, case), residual(n, case)
        server = server_of(compressor, 2)
        body = torch.zeros(server.layout(n).nbytes, dtype=torch.uint8)
        job = Reduction(bodies, compressor.layout(n), n, 2, server, err, body, None)
        runs.append(
            [
                (fn.__name__, grid, options)
                for fn, grid, options in recorded(
                    monkeypatch, lambda job=job: kernels.reduce_(compressor, job)
                )
            ]
        )
    assert [name for name, _, _ in runs[0]] == ["reduce_kernel"]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0][2]["enable_fp_fusion"] is False


class Plain:
    """A compressor of someone else's: it knows no reduction of its own."""

    name = "plain"

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.shard_unit, self.layout = inner.shard_unit, inner.layout

    def compress_(self, *args: Any, **options: Any) -> None:
        self.inner.compress_(*args, **options)

    def decompress_(self, *args: Any, **options: Any) -> None:
        self.inner.decompress_(*args, **options)


@pytest.mark.parametrize(
    "compressor",
    [gck.Sign(64), gck.Quantize(4, 64), gck.ChunkTopK(5, 64, server_k=5), gck.TopK(k=20)],
    ids=str,
)
def test_one_pass_is_the_steps(compressor: Any) -> None:
    """`reduce_` of a compressor that has one, of one that has not, and where its kernels have none."""
    n, ranks = 1000, 5
    bodies = torch.zeros(ranks, compressor.layout(n).nbytes, dtype=torch.uint8)
    for rank, row in enumerate(bodies):
        compressor.compress_(make("gaussian", n + rank, torch.float32)[0][:n], None, row[None])
    results = []
    for run in (
        lambda *given, **options: reduce_(compressor, *given, **options),
        lambda *given, **options: reduce_(Plain(compressor), *given, **options),
        lambda *given, **options: reduce_by_steps_(compressor, *given, **options),
    ):
        err, nonfinite = residual(n, "few nonfinite"), torch.zeros(1, dtype=torch.int64)
        body = torch.zeros(compressor.layout(n).nbytes, dtype=torch.uint8)
        run(bodies, err, body, n, divisor=ranks, nonfinite=nonfinite)
        results.append((err, body, nonfinite))
    for result in results[1:]:
        assert all(same_bytes(a, b) for a, b in zip(result, results[0], strict=True))
    assert int(results[0][2]) > 0


def test_nothing_to_reduce() -> None:
    for compressor in COMPRESSORS:
        bodies = torch.zeros(3, compressor.layout(100).nbytes, dtype=torch.uint8)
        err, body = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        compressor.reduce_(bodies, err, body, 0, capacity=100, divisor=3)


GOOD_N = 300
BAD: dict[str, tuple[type[GckError], str, dict[str, Any]]] = {
    "numel": (ArgumentError, r"numel must be in \[0, capacity\], got 301 and 300", {"numel": 301}),
    "float numel": (DtypeError, "numel must be an int, got float", {"numel": 300.0}),
    "divisor": (ArgumentError, r"divisor must be in \[1, 16777216\], got 0", {"divisor": 0}),
    "bodies": (CorruptPayloadError, "bodies must be", {"bodies": torch.zeros(2, 16, dtype=torch.uint8)}),
    "err": (ShapeMismatchError, "err must have 300 elements, got 299", {"err": torch.zeros(299)}),
    "err half": (DtypeError, "err must be float32", {"err": torch.zeros(300).half()}),
    "err strided": (LayoutError, "err must be contiguous", {"err": torch.zeros(600)[::2]}),
    "body": (ShapeMismatchError, "body must be", {"body": torch.zeros(16, dtype=torch.uint8)}),
    "body int8": (ShapeMismatchError, "of torch.int8", {"body": torch.zeros(64, dtype=torch.int8)}),
    "nonfinite": (DtypeError, "nonfinite must be int64", {"nonfinite": torch.zeros(1)}),
    "device": (DeviceMismatchError, "device of bodies", {"err": torch.zeros(300, device="meta")}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "compressor", [gck.Sign(32), gck.Quantize(4, 32), gck.ChunkTopK(5, 32, server_k=5)], ids=str
)
def test_bad_input_changes_nothing(compressor: Any, bad: str) -> None:
    error, text, change = BAD[bad]
    body = torch.zeros(compressor.layout(GOOD_N).nbytes, dtype=torch.uint8)
    given = {
        "bodies": payloads(compressor, 2, GOOD_N, GOOD_N),
        "err": torch.ones(GOOD_N),
        "body": body,
        "numel": GOOD_N,
        "capacity": GOOD_N,
    } | change
    err = given["err"]
    before = err.clone()
    with pytest.raises(error, match=rf"^{type(compressor).__name__}\.reduce_: .*{text}"):
        compressor.reduce_(**given)
    assert err.is_meta or torch.equal(err, before)
    assert not body.any()


def test_tensors_that_overlap() -> None:
    compressor = gck.Sign(32)
    nbytes = compressor.layout(GOOD_N).nbytes
    memory = torch.zeros(3, nbytes, dtype=torch.uint8)
    with pytest.raises(LayoutError, match=r"Sign\.reduce_: .*overlap in memory"):
        compressor.reduce_(memory, torch.zeros(GOOD_N), memory[1], GOOD_N)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_corrupt_payload_changes_nothing(rank: int) -> None:
    compressor = gck.ChunkTopK(k=4, chunk_size=64, index_bits=16, server_k=4)
    n = 70_000
    bodies = payloads(compressor, 3, n, n)
    compressor.layout(n).views(bodies[rank])[2].view(torch.int16)[4 * 500 + 2] = 64
    err, body = torch.ones(n), torch.zeros(compressor.layout(n).nbytes, dtype=torch.uint8)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    text = rf"^ChunkTopK\.reduce_: indices .* entry 2 of chunk 500 does not in body {rank}$"
    with pytest.raises(CorruptPayloadError, match=text):
        compressor.reduce_(bodies, err, body, n, nonfinite=nonfinite)
    assert torch.equal(err, torch.ones(n))
    assert not body.any()
    assert not nonfinite.any()
