"""The contract of a compressor: variants of each, and what one call must do on a backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.compressor import shard_numel
from gck.kernels.reference import read_residual
from tests.cases import Guarded, one_nan, same_bytes

VARIANTS: dict[str, list[Any]] = {
    "topk": [
        gck.TopK(ratio=0.01),
        gck.TopK(ratio=0.1, value_dtype=torch.bfloat16),
        gck.TopK(ratio=0.3, value_dtype=torch.bfloat16),
        gck.TopK(k=1, value_dtype=torch.float16),
        gck.TopK(ratio=1.0),
        gck.TopK(ratio=0.01, index_codec="elias_fano", value_bits=16),
        gck.TopK(ratio=0.3, index_codec="block16", value_bits=4),
    ],
    "sign": [gck.Sign(chunk_size=32), gck.Sign(), gck.Sign(chunk_size=8192)],
    "chunk_topk": [
        gck.ChunkTopK(),
        gck.ChunkTopK(value_bits=2),
        gck.ChunkTopK(k=5, chunk_size=32, value_bits=4),
        gck.ChunkTopK(k=16, chunk_size=32, value_bits=8, index_bits=16),
        gck.ChunkTopK(k=7, chunk_size=128, value_bits=2),
        gck.ChunkTopK(k=1, chunk_size=256, value_bits=32),
        gck.ChunkTopK(k=333, chunk_size=1024, value_bits=8),
        gck.ChunkTopK(k=1000, chunk_size=65536, value_bits=32),
    ],
    "quantize": [
        gck.Quantize(8),
        gck.Quantize(4, 64, "stochastic", seed=-3),
        gck.Quantize(2),
        gck.Quantize(2, 8192, scale="mean"),
    ],
    "random_k": [
        gck.RandomK(ratio=0.01, seed=0),
        gck.RandomK(ratio=0.1, seed=-3, value_dtype=torch.bfloat16),
        gck.RandomK(k=1, seed=2**40, value_dtype=torch.float16),
        gck.RandomK(ratio=0.7, seed=9),
        gck.RandomK(ratio=1.0, seed=1),
    ],
    "low_rank": [
        gck.LowRank(),
        gck.LowRank(rank=1, columns=32, seed=5),
        gck.LowRank(rank=8, seed=-3),
        gck.LowRank(rank=17, columns=100),
    ],
}
COMPRESSORS = [c for variants in VARIANTS.values() for c in variants]


def kernels_of(name: str, compressor: Any) -> tuple[Any, str]:
    """The kernels of a backend, and the device that they compute on."""
    package = type(compressor).__module__
    if name == "cpu":
        return import_module(f"{package}.cpu"), "cpu"
    device = "cuda" if name == "cuda" else "cpu"
    if name == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module(f"{package}.gpu"), device


def reference_of(compressor: Any) -> Any:
    return import_module(f"{type(compressor).__module__}.reference")


# Their scales are means, which may be 0 where something is negative.
SCALED_BY_MEANS = [gck.Sign(256), gck.Quantize(2, 256, scale="mean"), gck.ChunkTopK(64, 256, value_bits=2)]


def a_denormal_alone() -> tuple[Tensor, Tensor]:
    """A negative one among zeros, of which means are 0 and decoded -0."""
    grad = torch.zeros(600)
    grad[7] = -1e-45
    return grad, torch.zeros(600)


def check_case(compressor: Any, backend: str, grad: Tensor, err: Tensor, shards: int = 1) -> None:
    """Compress and decode between canaries, and compare every byte with the reference."""
    kernels, device = kernels_of(backend, compressor)
    reference = reference_of(compressor)
    n = grad.numel()
    fields, new_err, cleared = reference.compress(compressor, grad, err)
    dense = reference.decompress(compressor, fields, n)

    g, e = Guarded.of(grad.to(device)), Guarded.of(err.to(device))
    shard = shard_numel(n, compressor.shard_unit, shards)
    layout = compressor.layout(shard)
    memory = torch.full((shards, layout.nbytes + 48), 0xA5, dtype=torch.uint8, device=device)
    bodies = memory[:, 16 : 16 + layout.nbytes]
    bodies.zero_()
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    # Kernels find a clip on the device, where `KernelCompressor.run` puts it.
    options = {} if compressor.clip is None else {"clip": torch.tensor([compressor.clip], device=device)}
    kernels.compress_(compressor, g.inner, e.inner, bodies, nonfinite, **options)

    assert same_bytes(g.inner, grad)
    assert same_bytes(e.inner, new_err)
    assert int(nonfinite) == 5 + cleared
    assert g.intact()
    assert e.intact()
    assert (memory[:, :16] == 0xA5).all()
    assert (memory[:, 16 + layout.nbytes :] == 0xA5).all()
    for s in range(shards):
        part = slice(min(n, s * shard), min(n, (s + 1) * shard))
        got = layout.views(bodies[s])
        if part.start < part.stop:
            wanted = fields if shards == 1 else part_of(compressor, fields, part)
            for g_field, w_field in zip(got, wanted, strict=True):
                assert same_bytes(g_field[: w_field.numel()], w_field)
                assert not g_field[w_field.numel() :].view(torch.uint8).any()
        else:
            assert not bodies[s].any()
        out = Guarded.of(torch.full((part.stop - part.start,), torch.nan, device=device))
        if out.inner.numel():
            kernels.decompress_(compressor, out.inner, got, 1.0, False)
            assert same_bytes(one_nan(out.inner), one_nan(dense[part]).to(device))
            assert out.intact()
            base = torch.linspace(-2, 3, out.inner.numel(), device=device)
            out.inner.copy_(base)
            kernels.decompress_(compressor, out.inner, got, 0.7, True)
            alpha = torch.tensor(0.7)
            reached = reached_by(compressor, fields, n)
            wanted_sum = base.cpu().clone()
            wanted_sum[reached] = wanted_sum[reached] + (alpha * dense[part])[reached]
            assert same_bytes(one_nan(out.inner), one_nan(wanted_sum).to(device))
            assert out.intact()

    # What the reference itself must satisfy, said once more without it.
    acc = grad.float() + read_residual(compressor, err)
    residual = acc - dense
    assert same_bytes(new_err, torch.where(residual.isfinite(), residual, 0.0))
    assert bool(acc.isfinite().all()) or not bool(dense.isfinite().all())


def reached_by(compressor: Any, fields: tuple[Tensor, ...], n: int) -> Any:
    """The elements that decoding adds something to; to others, not even a zero."""
    if compressor.name == "topk":
        return reference_of(compressor).indices_of(compressor, fields, n)
    if compressor.name == "random_k":
        return torch.tensor(reference_of(compressor).indices(compressor.seed, n, fields[0].numel()))
    return slice(None)


def part_of(compressor: Any, fields: tuple[Tensor, ...], part: slice) -> list[Tensor]:
    """The fields of a shard: those of its chunks in the whole vector, and nothing else."""
    unit = compressor.shard_unit
    chunks = slice(part.start // unit, -(-part.stop // unit))
    counts = [field.count for field in compressor.layout(unit).fields]
    return [f[chunks.start * c : chunks.stop * c] for f, c in zip(fields, counts, strict=True)]
