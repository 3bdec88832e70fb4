"""Decoding of top-k payloads in Triton's interpreter: one payload, the sum of many, and hostile ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.wire import Layout
from tests.cases import GRAD_DTYPES, Guarded, make, same_bytes

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.kernels.topk import gpu, gpu_decode, reference


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_indices_out_of_range_write_nothing(index_dtype: torch.dtype) -> None:
    n = 1000
    limit = torch.iinfo(index_dtype)
    indices = torch.tensor([limit.min, -1, 0, 5, n - 1, n, n + 1, limit.max], dtype=index_dtype)
    values = torch.arange(1.0, 9.0)
    for accumulate in (False, True):
        out = Guarded.of(torch.full((n,), 0.25 if accumulate else math.nan))
        gpu.decompress_(gck.TopK(k=8), out.inner, (values, indices), 1.0, accumulate)
        wanted = torch.full((n,), 0.25 if accumulate else 0.0)
        wanted[[0, 5, n - 1]] += values[2:5]
        assert torch.equal(out.inner, wanted)
        assert out.intact()


def test_an_empty_payload_decodes_to_nothing() -> None:
    out = torch.full((10,), math.nan)
    empty = (torch.empty(0), torch.empty(0, dtype=torch.int32))
    gpu.decompress_(gck.TopK(k=1), out, empty, 1.0, False)
    assert not out.any()


def rows_of(layout: Layout, payloads: list[tuple[Tensor, Tensor]], stride: int | None = None) -> Tensor:
    """The bodies of these payloads, as rows that may be further apart than they are long."""
    memory = torch.full((len(payloads), stride or layout.nbytes), 0xA5, dtype=torch.uint8)
    bodies = memory[:, : layout.nbytes]
    for body, payload in zip(bodies, payloads, strict=True):
        for view, field in zip(layout.views(body), payload, strict=True):
            view.copy_(field)
    return bodies


def row_by_row(compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float) -> Tensor:
    for body in bodies:
        gpu.decompress_(compressor, out, layout.views(body), alpha, True)
    return out


@pytest.mark.parametrize("touch_from", [0, 2])
@pytest.mark.parametrize("n", [1, 257, 2000])
def test_sum_touches_what_it_adds_to(n: int, touch_from: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "SUM_TILE", 256)
    monkeypatch.setattr(gpu_decode, "TOUCH_FROM", touch_from)
    compressor = gck.TopK(ratio=0.05)
    layout = compressor.layout(n)
    payloads = []
    for rank in range(2):
        grad, err = make("gaussian", n + rank, torch.float32)
        payloads.append(reference.compress(compressor, grad[:n], err[:n])[0])
    bodies = rows_of(layout, payloads)
    base = torch.linspace(-3, 5, n)
    out = Guarded.of(base)
    gpu.decompress_sum_(compressor, out.inner, bodies, layout, 0.7, True)
    assert same_bytes(out.inner, row_by_row(compressor, base.clone(), bodies, layout, 0.7))
    assert out.intact()


@pytest.mark.parametrize("ways", [2, 4, 8, 64])
def test_bounds(ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of spread, crowded and lonely indices, for any number of parts a step."""
    monkeypatch.setattr(gpu_decode, "BOUNDS_WAYS", ways)
    n, tile = 3000, 256
    monkeypatch.setattr(gpu_decode, "SUM_TILE", tile)
    seen = []
    original = gpu_decode.sum_kernel

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: (seen.append(args[3]), original[grid](*args, **options))

    monkeypatch.setattr(gpu_decode, "sum_kernel", Watched())
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 7, 64, 65, 700):
        rows = [torch.randperm(n, generator=generator)[:k], torch.arange(k), torch.arange(n - k, n)]
        indices = [row.sort().values.to(torch.int32) for row in rows]
        layout = Layout.of((torch.float32, k), (torch.int32, k))
        bodies = rows_of(layout, [(torch.ones(k), row) for row in indices])
        gpu.decompress_sum_(gck.TopK(k=k), torch.empty(n), bodies, layout, 1.0, False)
        starts = torch.arange(0, n + tile, tile)
        wanted = torch.stack([torch.searchsorted(row, starts) for row in indices], 1)
        assert torch.equal(seen[-1].view(-1, 3).long(), wanted)


@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 255, 256, 2000])
def test_sum_is_row_by_row(n: int, value_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "SUM_TILE", 256)
    monkeypatch.setattr(gpu_decode, "SUM_FEW", (16, 4, 1))
    monkeypatch.setattr(gpu_decode, "SUM_MANY", (32, 4, 1))
    compressor = gck.TopK(ratio=0.2, value_dtype=value_dtype)
    for wide in (False, True):
        layout = compressor.layout(n)
        if wide:
            k = layout.fields[0].count
            layout = Layout.of((value_dtype, k), (torch.int64, k))
        payloads = []
        for rank, case in enumerate(("gaussian", "clustered", "ties", "few nonfinite", "gaussian")):
            grad, err = make(case, n + rank, torch.float32)
            payloads.append(reference.compress(compressor, grad[:n], err[:n])[0])
        bodies = rows_of(layout, payloads, layout.nbytes + 48)
        before = bodies.clone()
        base = torch.linspace(-3, 5, n)
        for alpha, accumulate in ((1.0, False), (-0.3, True)):
            start = base if accumulate else torch.zeros(n)
            wanted = row_by_row(compressor, start.clone(), bodies, layout, alpha)
            out = Guarded.of(base if accumulate else torch.full((n,), math.nan))
            gpu.decompress_sum_(compressor, out.inner, bodies, layout, alpha, accumulate)
            assert torch.equal(out.inner.nan_to_num(7.0), wanted.nan_to_num(7.0))
            assert out.intact()
        assert torch.equal(bodies, before)


def test_sum_adds_in_the_order_of_the_rows() -> None:
    """Numbers whose sum depends on the order, at one element."""
    values = [1e8, 1.0, -1e8, 0.25]
    compressor = gck.TopK(k=1)
    layout = compressor.layout(5000)
    payloads = [(torch.tensor([v]), torch.tensor([4999], dtype=torch.int32)) for v in values]
    out = torch.full((5000,), math.nan)
    gpu.decompress_sum_(compressor, out, rows_of(layout, payloads), layout, 1.0, False)
    wanted = torch.zeros(5000)
    for value in values:
        wanted[4999] += value
    assert same_bytes(out, wanted)


def test_sum_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """k = n: each tile takes many blocks of each rank."""
    monkeypatch.setattr(gpu_decode, "SUM_TILE", 256)
    n = 700
    compressor = gck.TopK(ratio=1.0)
    layout = compressor.layout(n)
    vectors = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    bodies = rows_of(layout, [(v, torch.arange(n, dtype=torch.int32)) for v in vectors])
    out = torch.empty(n)
    gpu.decompress_sum_(compressor, out, bodies, layout, 1.0, False)
    assert same_bytes(out, (vectors[0] + vectors[1]) + vectors[2])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_hostile_indices_stay_in_bounds(index_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "SUM_TILE", 256)
    n, k = 1000, 64
    limit = torch.iinfo(index_dtype)
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([limit.min, limit.max, -1, n, n + 1, 2**31 - 1, -n, 0, n - 1], dtype=torch.int64)
    layout = Layout.of((torch.float32, k), (index_dtype, k))
    payloads = []
    for _ in range(6):
        indices = torch.randint(-2 * n, 2 * n, (k,), generator=generator)
        indices[torch.randperm(k, generator=generator)[: len(ends)]] = ends
        payloads.append((torch.ones(k), indices.to(index_dtype)))
    payloads.append((torch.ones(k), torch.full((k,), n, dtype=index_dtype)))  # all out of range
    payloads.append((torch.ones(k), torch.full((k,), 300, dtype=index_dtype)))  # all the same
    out = Guarded.of(torch.zeros(n))
    gpu.decompress_sum_(gck.TopK(k=k), out.inner, rows_of(layout, payloads), layout, 1.0, True)
    assert out.intact()
    named = torch.cat([indices for _, indices in payloads]).long()
    untouched = torch.ones(n, dtype=torch.bool)
    untouched[named[(named >= 0) & (named < n)]] = False
    assert not out.inner[untouched].any()
    assert out.inner.isfinite().all()
