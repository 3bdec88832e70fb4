"""Chunk top-k beyond the contract: codes and levels, sums over ranks, hostile payloads, several tiles."""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.compressor import shard_numel
from gck.errors import CorruptPayloadError
from gck.kernels.chunk_topk import VALUE_BITS, ChunkTopK, cpu, reference
from tests.cases import GRAD_DTYPES, Guarded, make, one_nan, same_bytes
from tests.contract import check_case

interpreted = pytest.param(
    "interpreter",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here"),
)
BACKENDS = ["cpu", interpreted]


def kernels(backend: str) -> Any:
    return cpu if backend == "cpu" else import_module("gck.kernels.chunk_topk.gpu")


def body_of(compressor: ChunkTopK, grad: Tensor, shards: int = 1) -> Tensor:
    shard = shard_numel(grad.numel(), compressor.chunk_size, shards)
    bodies = torch.zeros(shards, compressor.layout(shard).nbytes, dtype=torch.uint8)
    cpu.compress_(compressor, grad, torch.full((grad.numel(),), -0.0), bodies, None)
    return bodies


def residual_of(compressor: ChunkTopK, x: Tensor) -> Tensor:
    err = x.clone()
    bodies = torch.zeros(1, compressor.layout(x.numel()).nbytes, dtype=torch.uint8)
    cpu.compress_(compressor, torch.full_like(x, -0.0), err, bodies, None)
    return err


def test_bytes_of_a_chunk() -> None:
    """Of SparseLoCo's setting, as documented: 96 of indices, 16 of codes, 8 of levels."""
    compressor = gck.ChunkTopK(k=64, chunk_size=4096, value_bits=2)
    values, scales, indices = compressor.layout(4096).fields
    assert (values.count, scales.count * 4, indices.count) == (16, 8, 96)
    assert compressor.layout(1000 * 4096).nbytes == 1000 * 120


def test_bits_as_documented() -> None:
    grad = torch.zeros(64)
    grad[[3, 10, 63]] = torch.tensor([7.0, -3.5, 1.2])
    body = body_of(ChunkTopK(k=3, chunk_size=64, value_bits=4), grad)[0]
    assert body[0:2].tolist() == [0x7 | 0xC << 4, 0x1]  # 7, -4 (of -3.5, to even), 1
    assert body[16:20].view(torch.float32).item() == 1.0
    assert body[32:37].tolist() == [3, 10 << 4 & 0xFF, 10 >> 4, 63, 0]
    body = body_of(ChunkTopK(k=3, chunk_size=64, value_bits=2), grad)[0]
    assert body[0].item() == 0b11 | 0b00 << 2 | 0b10 << 4
    assert body[16:24].view(torch.float32).tolist() == [torch.tensor((3.5 + 1.2) / 2).item(), 7.0]
    body = body_of(ChunkTopK(k=2, chunk_size=64, value_bits=32, index_bits=16), grad)[0]
    assert body[:8].view(torch.float32).tolist() == [7.0, -3.5]
    assert body[16:20].view(torch.int16).tolist() == [3, 10]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_halfway_values_round_to_even(bits: int, backend: str) -> None:
    qmax = 2 ** (bits - 1) - 1
    halves = torch.arange(-qmax, qmax + 1).float() + 0.5
    x = torch.cat([halves[:-1], halves.nextafter(halves + 1), torch.tensor([float(qmax)])])
    size = 1 << (2 * len(x) - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - len(x)))
    check_case(ChunkTopK(size // 2, size, bits), backend, x, torch.zeros(size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", VALUE_BITS)
def test_extreme_magnitudes(bits: int, backend: str) -> None:
    """Scales that are denormal, or nearly, and products and sums that overflow."""
    largest = torch.finfo(torch.float32).max
    for x in (
        [largest, -largest, largest, 1.0],
        [largest, 1e-38],
        [2.0**-126 * 7, 2.0**-126 * 127, 1e-45, -1e-40],
        [2.0**-126 * 6.9, -1e-45],
        [math.inf, -1.0, 3.0, -math.inf],
        [math.nan, math.inf, 1.0, -2.0],
        [-0.0, -0.0],
        [1.0, 1.0 + 2**-23, 1.0 + 2**-22],  # the mean of three rounds
    ):
        grad = torch.nn.functional.pad(torch.tensor(x), (0, 70 - len(x)))
        check_case(ChunkTopK(5, 32, bits), backend, grad, torch.zeros(70))
        check_case(ChunkTopK(3, 32, bits), backend, grad.flip(0), torch.zeros(70))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_contraction(data: st.DataObject) -> None:
    """||x - C(x)||^2 <= (1 - k / d) ||x||^2 for exact values, in every chunk."""
    size = data.draw(st.sampled_from([32, 64, 256]))
    k = data.draw(st.integers(1, size // 2))
    floats = st.floats(-1e10, 1e10, width=32)
    chunk = data.draw(st.lists(floats, min_size=1, max_size=40))
    x = torch.tensor([*chunk, *([data.draw(floats)] * (size - len(chunk)))][:size])
    err = residual_of(ChunkTopK(k, size, 32), x).double()
    assert float(err.square().sum()) <= (1 - k / size) * float(x.double().square().sum()) * (1 + 1e-12)
    assert int((err != x.double()).sum()) <= k


@pytest.mark.parametrize("bits", VALUE_BITS)
def test_what_fewer_bits_lose_is_bounded(bits: int) -> None:
    """Still a contraction on gradients, and never worse than a level's distance from its values."""
    x = make("gaussian", 64 * 4096, torch.float32)[0]
    err = residual_of(ChunkTopK(64, 4096, bits), x)
    exact = residual_of(ChunkTopK(64, 4096, 32), x)
    energy, left, least = (float(t.double().square().sum()) for t in (x, err, exact))
    assert least <= left <= least + 0.05 * (energy - least)
    sent = exact == 0
    scale = x.view(-1, 4096).abs().amax(1).repeat_interleave(4096)
    worst = {32: 0.0, 16: 2**-8, 8: 0.5 / 127, 4: 0.5 / 7, 2: 0.5}[bits]
    assert bool((err[sent].abs() <= worst * scale[sent] * 1.001).all())
    assert torch.equal(err[~sent], x[~sent])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_other_than_the_selected_loses(backend: str) -> None:
    """Ties that end anywhere, in chunks of one tile and of several, with and without a tail."""
    for size, k in ((64, 9), (4096, 64), (16384, 5000)):
        grad = torch.ones(2 * size + 17)
        grad[size // 2 :: 7] = -2.0
        check_case(ChunkTopK(k, size, 32), backend, grad, torch.zeros(len(grad)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize(
    "compressor",
    [ChunkTopK(100, 8192, 16), ChunkTopK(77, 16384, 4), ChunkTopK(5000, 32768, 2), ChunkTopK(3, 65536, 8)],
    ids=str,
)
def test_large_chunks_in_the_interpreter(compressor: ChunkTopK, dtype: torch.dtype) -> None:
    size = compressor.chunk_size
    for case, n in (("few nonfinite", 2 * size), ("nonfinite", size + 4097), ("clustered", size - 1)):
        check_case(compressor, "interpreter", *make(case, n, dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize("compressor", [ChunkTopK(64, 4096, 32), ChunkTopK(100, 2048, 2)], ids=str)
def test_lists_that_are_just_full_or_overflow(compressor: ChunkTopK) -> None:
    """Rows of 4 that reach the floor, as many as the list holds and one more: ties, and numbers that differ
    in groups whose maxima let the floor fall."""
    options, _ = kernels("interpreter").compress_options(compressor)
    capacity, groups, size = options["CAPACITY"], options["GROUPS"], compressor.chunk_size
    assert capacity > 0
    for rows in (capacity, capacity + 1):
        grad = torch.zeros(2 * size)
        grad[size - 4 * rows : size : 4] = 1.0
        grad[size + 3 : size + 4 * rows : 4] = torch.linspace(-1, 2, rows)
        check_case(compressor, "interpreter", grad, torch.zeros(2 * size))
    few = torch.arange(size) // 4 % groups < compressor.k - 1
    grad = torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.where(few, 100.0, 1.0)
    check_case(compressor, "interpreter", grad, torch.zeros(size))


def last_shards(compressor: ChunkTopK, n: int, ranks: int) -> tuple[Tensor, int, int]:
    """(bodies of the second of two shards, rank by rank, with a gap between rows; their capacity; how many
    elements they cover). One rank's has entries that are not finite."""
    capacity = shard_numel(n, compressor.chunk_size, 2)
    memory = torch.zeros(ranks, compressor.layout(capacity).nbytes + 32, dtype=torch.uint8)
    for rank, row in enumerate(memory):
        grad = make("nonfinite" if rank == 1 else "gaussian", n + rank, torch.float32)[0][:n]
        row[16:-16] = body_of(compressor, grad, shards=2)[1]
    return memory[:, 16:-16], capacity, n - capacity


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", VALUE_BITS)
def test_sum_is_that_of_one_rank_after_another(bits: int, backend: str) -> None:
    for compressor, n in ((ChunkTopK(5, 64, bits), 700), (ChunkTopK(1100, 8192, bits), 3 * 8192 - 60)):
        bodies, capacity, valid = last_shards(compressor, n, ranks=3)
        assert valid < capacity
        base = torch.linspace(-2, 3, valid)
        for accumulate in (False, True):
            wanted = base.clone() if accumulate else torch.zeros(valid)
            for body in bodies:
                fields = compressor.layout(capacity).views(body)
                dense = reference.decompress(compressor, fields, valid)
                wanted += torch.tensor(0.7) * dense
            out = Guarded.of(base if accumulate else torch.full((valid,), math.nan))
            kernels(backend).decompress_sum_(
                compressor, out.inner, bodies, compressor.layout(capacity), 0.7, accumulate
            )
            assert same_bytes(one_nan(out.inner), one_nan(wanted))
            assert out.intact()


def with_index(compressor: ChunkTopK, body: Tensor, numel: int, entry: int, index: int) -> Tensor:
    """A copy of `body` whose indices, k a chunk and unpacked, hold `index` at `entry`."""
    changed = body.clone()
    indices = compressor.layout(numel).views(changed)[2]
    indices.view(torch.int16)[entry] = index
    return changed


HOSTILE = {"out of range": (6, 60), "far": (6, -1), "order": (2, 0), "twice": (1, 0), "tail": (12, 7)}


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_indices_change_nothing(bad: str) -> None:
    entry, index = HOSTILE[bad]
    compressor, n = ChunkTopK(5, 32, 4, index_bits=16), 32 * 2 + 7  # entries 10 to 14 are of 7 elements
    grad = torch.arange(n, 0, -1).float()  # selects 0 to 4 of each chunk
    good = body_of(compressor, grad)[0]
    hostile = with_index(compressor, good, n, entry, index)
    out = torch.arange(float(n))
    limit = 7 if entry >= 10 else 32
    text = rf"ascend within \[0, {limit}\), but entry {entry % 5} of chunk {entry // 5} does not"
    for accumulate in (False, True):
        with pytest.raises(CorruptPayloadError, match=text):
            compressor.decompress_(out, hostile, accumulate=accumulate)
        with pytest.raises(CorruptPayloadError, match=f"{text} in body 1"):
            cpu.decompress_sum_(
                compressor, out, torch.stack([good, hostile]), compressor.layout(n), 1.0, accumulate
            )
    assert torch.equal(out, torch.arange(float(n)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_indices_out_of_range_are_skipped_on_the_gpu() -> None:
    compressor, n = ChunkTopK(5, 32, 32, index_bits=16), 32 * 2 + 7
    body = body_of(compressor, torch.arange(n, 0, -1).float())[0]
    for entry, index in ((6, 60), (6, -1), (12, 7)):
        hostile = with_index(compressor, body, n, entry, index)
        wanted = reference.decompress(compressor, compressor.layout(n).views(body), n)
        wanted[entry // 5 * 32 + entry % 5] = 0
        out = Guarded.of(torch.full((n,), math.nan))
        fields = compressor.layout(n).views(hostile)
        kernels("interpreter").decompress_(compressor, out.inner, fields, 1.0, False)
        assert torch.equal(out.inner, wanted)
        assert out.intact()


@pytest.mark.parametrize("k", [3, 64])
def test_body_for_fewer_elements_than_it_holds_is_refused_or_exact(k: int) -> None:
    """A payload cut short by hand: what lies past the end is noticed."""
    compressor = ChunkTopK(k, 128, 32)
    grad = torch.arange(256).float()  # selects the end of each chunk
    fields = compressor.layout(256).views(body_of(compressor, grad)[0])
    out = torch.zeros(128)
    compressor.decompress("decompress", out, fields, 1.0, False)
    assert torch.equal(out, reference.decompress(compressor, fields, 128))
    with pytest.raises(CorruptPayloadError, match=r"ascend within \[0, 72\)"):
        compressor.decompress("decompress", torch.zeros(200), fields, 1.0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
@pytest.mark.parametrize("compressor", [ChunkTopK(4, 64, 2), ChunkTopK(9, 16384, 16)], ids=str)
def test_launches(compressor: ChunkTopK, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values, arguments that bind, and contraction pinned off."""
    from triton.runtime.interpreter import InterpretedFunction

    gpu, launch, seen = kernels("interpreter"), InterpretedFunction.run, []

    def spy(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = {name: value for name, value in options.items() if name.isupper()}
        inspect.signature(self.fn).bind(*args, **named)
        seen.append((self.fn.__name__, grid, options))
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", spy)
    runs = []
    for case in ("gaussian", "all nan", "all zero"):
        grad, err = make(case, 20_000, torch.float32)
        bodies = torch.zeros(1, compressor.layout(20_000).nbytes, dtype=torch.uint8)
        gpu.compress_(compressor, grad, err, bodies, None)
        gpu.decompress_(compressor, err, compressor.layout(20_000).views(bodies[0]), 1.0, True)
        gpu.decompress_sum_(compressor, err, bodies, compressor.layout(20_000), 1.0, False)
        runs.append(seen[:])
        seen.clear()
    assert [name for name, _, _ in runs[0]] == ["compress_kernel", "decompress_kernel", "decompress_kernel"]
    assert runs[0] == runs[1] == runs[2]
    assert all(options["enable_fp_fusion"] is False for _, _, options in runs[0])


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "k 0": (gck.errors.ArgumentError, r"k must be in \[1, chunk_size / 2 = 2048\], got 0", {"k": 0}),
    "k high": (gck.errors.ArgumentError, r"chunk_size / 2 = 16\], got 17", {"k": 17, "chunk_size": 32}),
    "k float": (gck.errors.DtypeError, r"k must be an int, got 2.0 \(float\)", {"k": 2.0}),
    "server_k": (
        gck.errors.ArgumentError,
        r"server_k must be in \[1, .* = 2048\], got 2049",
        {"server_k": 2049},
    ),
    "server_k str": (gck.errors.DtypeError, r"server_k must be an int, got 'k' \(str\)", {"server_k": "k"}),
    "k bool": (gck.errors.DtypeError, r"k must be an int, got True \(bool\)", {"k": True}),
    "chunk": (gck.errors.ArgumentError, r"power of two in \[32, 65536\], got 100", {"chunk_size": 100}),
    "chunk high": (gck.errors.ArgumentError, "got 131072", {"chunk_size": 131072}),
    "bits": (gck.errors.ArgumentError, "value_bits must be one of 32, 16, 8, 4, 2, got 5", {"value_bits": 5}),
    "bits text": (gck.errors.DtypeError, r"value_bits must be an int, got '4' \(str\)", {"value_bits": "4"}),
    "index": (gck.errors.ArgumentError, "index_bits must be 16, or 12 .*, got 8 with", {"index_bits": 8}),
    "index text": (
        gck.errors.DtypeError,
        r"index_bits must be an int or None, got '12' \(str\)",
        {"index_bits": "12"},
    ),
    "12 of many": (
        gck.errors.ArgumentError,
        "12 where chunk_size is at most 4096, got 12 with chunk_size 8192",
        {"index_bits": 12, "chunk_size": 8192},
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_options_out_of_range(bad: str) -> None:
    error, text, options = BAD[bad]
    with pytest.raises(error, match=f"^ChunkTopK: .*{text}"):
        ChunkTopK(**options)


def test_the_second_phase_keeps_more_of_a_sum() -> None:
    """min(W, 4) * k entries, at most half of the chunk, unless it is told how many."""
    compressor = gck.ChunkTopK(k=5, chunk_size=32, value_bits=8, clip=2.0)
    kept = [compressor.server_for(world_size).k for world_size in (1, 2, 3, 4, 1024)]
    assert kept == [5, 10, 15, 16, 16]
    assert gck.ChunkTopK().server_for(64).k == 256
    assert gck.ChunkTopK(k=5, server_k=3).server_for(64).k == 3
    assert compressor.server_for(2) == gck.ChunkTopK(k=10, chunk_size=32, value_bits=8, clip=2.0)
