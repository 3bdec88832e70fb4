"""Packed payloads to the packed payload of their sum: in one pass, the bytes of the oracles in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.compressor import reduce_, reduce_by_steps_, residual_of, server_of
from gck.kernels.common.reduction import Reduction
from tests.cases import CASES, Guarded, make, one_nan, same_bytes
from tests.kernels.bits import bit_patterns
from tests.kernels.launches import recorded
from tests.kernels.reductions import (
    COMPRESSORS,
    MANY,
    PACKED,
    READ,
    TOPK,
    TOPKS,
    check,
    kernels_of,
    payloads,
    reference,
    residual,
)
from tests.kernels.test_gpu import synchronisation_is_an_error


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_ranks(compressor: Any, ranks: int) -> None:
    for n in (1, 33, 4999):
        bodies = payloads(compressor, ranks, n, n)
        check(compressor, "cpu", bodies, n, n, residual(n), 1)
        check(compressor, "cpu", bodies, n, n, residual(n), ranks)


@pytest.mark.parametrize("ranks", [64, 1024])
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.chunk_size <= 4096], ids=str)
def test_many_ranks(compressor: Any, ranks: int) -> None:
    n = compressor.chunk_size + 7
    bodies = payloads(compressor, 7, n, n).repeat(-(-ranks // 7), 1)[:ranks]
    check(compressor, "cpu", bodies, n, n, residual(n), ranks)
    check(compressor, "cpu", bodies, n, n, None, 1)


@pytest.mark.parametrize("compressor", [gck.Sign(32), gck.Quantize(4, 32), TOPK], ids=str)
def test_many_ranks_in_the_interpreter(compressor: Any) -> None:
    n = 2 * compressor.chunk_size + 7
    bodies = payloads(compressor, 7, n, n).repeat(10, 1)[:64]
    check(compressor, "interpreter", bodies, n, n, residual(n), 64)
    check(compressor, "interpreter", bodies, n, n, None, 1)


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


@pytest.mark.parametrize("backend", ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compressor", READ, ids=str)
def test_a_residual_that_fades_and_is_bounded(
    compressor: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the one pass: nothing is left to be done by steps."""
    monkeypatch.delattr("gck.kernels.common.base.reduce_by_steps_")
    assert not same_bytes(residual_of(compressor, residual(4999)), residual(4999))
    for n, ranks, more in ((compressor.chunk_size + 33, 3, 0), (4999, 9, 700)):
        bodies = payloads(compressor, ranks, n, n + more)
        check(compressor, backend, bodies, n, n + more, residual(n), ranks)
    for case in ("few nonfinite", "huge", "minus zero"):
        check(compressor, backend, payloads(compressor, 2, n, n, case), n, n, residual(n, case), 1)
    check(compressor, backend, bodies, n, n + more, None, ranks)


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


@pytest.mark.parametrize("n", [4999, (1 << 21) + 33])  # and past the caches
@pytest.mark.parametrize(
    "compressor",
    [*COMPRESSORS, gck.TopK(0.01), gck.TopK(0.01, value_bits=4), gck.RandomK(0.01, seed=0)],
    ids=str,
)
def test_a_mean_is_the_sum_divided(compressor: Any, n: int) -> None:
    ranks = 3
    bodies = payloads(compressor, ranks, n, n, "few nonfinite")
    got, wanted = Guarded.of(torch.full((n,), 7.0)), torch.zeros(n)
    compressor.decompress_mean_(got.inner, bodies, ranks)
    for body in bodies:
        compressor.decompress_(wanted, body, accumulate=True)
    assert same_bytes(one_nan(got.inner), one_nan(wanted / ranks))
    assert got.intact()


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
