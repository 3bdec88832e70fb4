"""The Triton kernels on a GPU: large vectors, CUDA graphs, no host synchronisation, 64-bit addresses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.compressor import shard_numel
from tests.cases import GRAD_DTYPES, make, same_bytes
from tests.contract import SCALED_BY_MEANS, a_denormal_alone, check_case

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

COMPRESSORS = [
    gck.TopK(ratio=0.01),
    gck.TopK(ratio=0.1, value_dtype=torch.bfloat16),
    gck.Sign(256),
    gck.Sign(8192),
    gck.ChunkTopK(value_bits=2),
    gck.ChunkTopK(k=300, chunk_size=16384),
    gck.Quantize(8),
    gck.Quantize(4, 64, "stochastic", seed=2**40 + 5),
    gck.Quantize(2, 8192, scale="mean"),
    gck.RandomK(ratio=0.02, seed=4),
    gck.RandomK(k=3, seed=-4, value_dtype=torch.bfloat16),
    gck.LowRank(rank=4, seed=5),
    gck.LowRank(rank=16, columns=1000),
]
# Past 2**31 elements, by a few chunks of any size and an odd rest.
HUGE = 2**31 + 3 * 8192 + 17


def kernels_of(compressor: Any) -> Any:
    return import_module(f"{type(compressor).__module__}.gpu")


def reference_of(compressor: Any) -> Any:
    return import_module(f"{type(compressor).__module__}.reference")


def body_of(compressor: Any, n: int) -> Tensor:
    nbytes = compressor.layout(shard_numel(n, compressor.shard_unit, 1)).nbytes
    return torch.zeros(1, nbytes, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("compressor", SCALED_BY_MEANS, ids=str)
def test_what_is_negative_of_a_scale_of_zero(compressor: Any) -> None:
    """-0, which Triton 3.6 would subtract from 0."""
    check_case(compressor, "cuda", *a_denormal_alone())


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    # It warns of being a prototype, after which the mode would stay.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ["gaussian", "ties", "nonfinite", "all equal", "denormal", "clustered"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_million(compressor: Any, case: str) -> None:
    for dtype in GRAD_DTYPES:
        check_case(compressor, "cuda", *make(case, 1_000_003, dtype))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_25_million(compressor: Any) -> None:
    check_case(compressor, "cuda", *make("gaussian", 25_000_000, torch.float32))


def test_shards_of_a_million() -> None:
    for compressor in (gck.Sign(256), gck.ChunkTopK(value_bits=4), gck.Quantize(4, 64, "stochastic", seed=0)):
        for shards in (3, 8):
            check_case(compressor, "cuda", *make("gaussian", 1_000_003, torch.bfloat16), shards=shards)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_the_same_bytes_every_time(compressor: Any) -> None:
    """Races would show as a difference between runs."""
    kernels, n = kernels_of(compressor), 3_000_001
    grad, err = (x.cuda() for x in make("ties", n, torch.float32))
    runs = []
    for _ in range(20):
        e, body = err.clone(), body_of(compressor, n)
        kernels.compress_(compressor, grad, e, body, None)
        runs.append((e, body))
    assert all(same_bytes(e, runs[0][0]) and same_bytes(body, runs[0][1]) for e, body in runs)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_no_host_synchronisation(compressor: Any) -> None:
    kernels, n = kernels_of(compressor), 100_003
    grad, err = (x.cuda() for x in make("few nonfinite", n, torch.bfloat16))
    body, out = body_of(compressor, n), torch.zeros(n, device="cuda")
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        kernels.compress_(compressor, grad, err, body, nonfinite)
        fields = compressor.layout(n).views(body[0])
        kernels.decompress_(compressor, out, fields, 0.5, False)
        kernels.decompress_(compressor, out, fields, 0.5, True)

    step()  # compiles
    with synchronisation_is_an_error():
        step()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_graph_replays_on_new_data(compressor: Any) -> None:
    kernels, reference, n = kernels_of(compressor), reference_of(compressor), 300_007
    grad, err = torch.empty(n, device="cuda"), torch.zeros(n, device="cuda")
    body, out = body_of(compressor, n), torch.empty(n, device="cuda")
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        body.zero_()
        kernels.compress_(compressor, grad, err, body, nonfinite)
        kernels.decompress_(compressor, out, compressor.layout(n).views(body[0]), 1.0, False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    err.zero_()
    nonfinite.zero_()
    wanted_err, cleared = torch.zeros(n), 0
    for case in ("gaussian", "nonfinite", "all zero", "ties", "outlier"):
        fresh, _ = make(case, n, torch.float32)
        grad.copy_(fresh)
        graph.replay()
        fields, wanted_err, more = reference.compress(compressor, fresh, wanted_err)
        cleared += more
        for got, wanted in zip(compressor.layout(n).views(body[0]), fields, strict=True):
            assert same_bytes(got, wanted), case
        assert same_bytes(err, wanted_err), case
        assert int(nonfinite) == cleared
        dense = reference.decompress(compressor, fields, n)
        assert torch.equal(out.cpu().nan_to_num(7.0), dense.nan_to_num(7.0))


def test_the_current_stream_is_used() -> None:
    """A long kernel before, on the same side stream: work on any other stream would overtake it."""
    compressor, n = gck.TopK(k=100), 1_000_000
    kernels = kernels_of(compressor)
    grad, err = (x.cuda() for x in make("gaussian", n, torch.float32))
    kernels.compress_(compressor, grad, err.clone(), body_of(compressor, n), None)  # compiles
    late, body = torch.zeros_like(err), body_of(compressor, n)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(err)
        kernels.compress_(compressor, grad, late, body, None)
    side.synchronize()
    fields, wanted_err, _ = reference_of(compressor).compress(compressor, grad.cpu(), err.cpu())
    assert same_bytes(late, wanted_err)
    assert same_bytes(compressor.layout(n).views(body[0])[1], fields[1])


def needs_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free / 2**30:.0f} free")


@pytest.mark.xdist_group("huge")
def test_topk_past_2_31_elements() -> None:
    needs_memory(32)
    spikes = torch.cat(
        [torch.arange(50), torch.arange(2**31 - 50, 2**31 + 50), torch.arange(HUGE - 50, HUGE)]
    )
    heights = torch.randperm(200, generator=torch.Generator().manual_seed(0)).float() + 1
    grad = torch.zeros(HUGE, dtype=torch.bfloat16, device="cuda")
    grad[spikes.cuda()] = heights.cuda().bfloat16()
    err = torch.zeros(HUGE, device="cuda")
    compressor = gck.TopK(k=120)
    body = body_of(compressor, HUGE)
    kernels_of(compressor).compress_(compressor, grad, err, body, None)
    values, indices = (field.cpu() for field in compressor.layout(HUGE).views(body[0]))
    wins = heights > 80
    assert indices.dtype == torch.int64
    assert torch.equal(indices, spikes[wins])
    assert torch.equal(values, heights[wins])
    assert torch.equal(err[spikes.cuda()].cpu(), torch.where(wins, 0.0, heights))
    assert int(err.count_nonzero()) == 80
    kernels_of(compressor).decompress_(compressor, err, (values.cuda(), indices.cuda()), 1.0, False)
    assert torch.equal(err[spikes.cuda()].cpu(), torch.where(wins, heights, 0.0))
    assert int(err.count_nonzero()) == 120


@pytest.mark.xdist_group("huge")
@pytest.mark.parametrize("compressor", [gck.Sign(256), gck.Quantize(4)], ids=str)
def test_chunks_past_2_31_elements(compressor: Any) -> None:
    needs_memory(32)
    bits = getattr(compressor, "bits", 1)
    grad = torch.empty(HUGE, dtype=torch.bfloat16, device="cuda").normal_()
    err = torch.zeros(HUGE, device="cuda")
    body = body_of(compressor, HUGE)
    kernels_of(compressor).compress_(compressor, grad, err, body, None)
    codes, scales = compressor.layout(HUGE).views(body[0])
    out = torch.full((HUGE,), torch.nan, device="cuda")
    kernels_of(compressor).decompress_(compressor, out, (codes, scales), 1.0, False)
    # Chunks do not depend on each other: compare the two ends and both sides of 2**31.
    for first, last in ((0, 5120), (2**31 - 5120, 2**31 + 5120), ((HUGE - 5120) // 256 * 256, HUGE)):
        part = grad[first:last].cpu()
        fields, residual, _ = reference_of(compressor).compress(compressor, part, torch.zeros(last - first))
        wanted = fields[0].view(torch.uint8)
        begin = first * bits // 8
        assert same_bytes(codes.view(torch.uint8)[begin : begin + wanted.numel()], wanted)
        assert same_bytes(scales[first // 256 : -(-last // 256)], fields[1])
        assert same_bytes(err[first:last], residual)
        dense = reference_of(compressor).decompress(compressor, fields, last - first)
        assert same_bytes(out[first:last], dense)
    assert not out.isnan().any()


@pytest.mark.xdist_group("huge")
def test_random_k_past_2_31_elements() -> None:
    needs_memory(32)
    compressor = gck.RandomK(k=10_001, seed=2**35)
    grad = torch.empty(HUGE, dtype=torch.bfloat16, device="cuda").normal_()
    err = torch.zeros(HUGE, device="cuda")
    body = body_of(compressor, HUGE)
    kernels_of(compressor).compress_(compressor, grad, err, body, None)
    indices = torch.tensor(reference_of(compressor).indices(2**35, HUGE, 10_001), device="cuda")
    (values,) = compressor.layout(HUGE).views(body[0])
    assert same_bytes(values, grad[indices].float())
    assert not err[indices].any()
    kernels_of(compressor).decompress_(compressor, err, (values,), 1.0, True)
    assert torch.equal(err, grad.float())
