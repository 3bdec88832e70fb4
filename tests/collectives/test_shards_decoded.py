"""Decoding all shards of a vector in one call against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gck
from gck.compressor import decompress_shards_, shard_numel
from gck.errors import CorruptPayloadError
from gck.kernels.common import base
from tests.cases import same_bytes

COMPRESSORS = [
    gck.Sign(chunk_size=32),
    gck.Quantize(bits=8, chunk_size=64),
    gck.Quantize(bits=2, chunk_size=32, rounding="stochastic", seed=3),
    gck.ChunkTopK(k=3, chunk_size=32, value_bits=4),
    gck.ChunkTopK(k=5, chunk_size=64, value_bits=2, index_bits=16),
    gck.ChunkTopK(k=1, chunk_size=32, value_bits=32),
    gck.ChunkTopK(k=1, chunk_size=32, value_bits=8),  # a single byte of codes a chunk
]


class Plain:
    """A compressor with nothing but the protocol."""

    def __init__(self, inner: Any) -> None:
        self.layout, self.decompress_ = inner.layout, inner.decompress_


def bodies_of(compressor: Any, grad: torch.Tensor, shards: int) -> torch.Tensor:
    """As `two_phase` gathers them: of a shard cut short, a shorter body at the start of its row."""
    shard = shard_numel(grad.numel(), compressor.shard_unit, shards)
    bodies = torch.zeros(shards, compressor.layout(shard).nbytes, dtype=torch.uint8)
    for part, body in zip(grad.split(shard), bodies, strict=False):
        compressor.compress_(part, None, body[: compressor.layout(part.numel()).nbytes].unsqueeze(0))
    return bodies


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize(("numel", "shards"), [(1, 3), (640, 5), (641, 5), (3001, 7), (65, 4), (4096, 1)])
def test_side_by_side(compressor: Any, numel: int, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    bodies, shard = bodies_of(compressor, grad, shards), shard_numel(numel, compressor.shard_unit, shards)
    calls: list[Any] = []
    decompress = base.KernelCompressor.decompress

    def counted(*args: Any) -> None:
        calls.append(args)
        decompress(*args)

    monkeypatch.setattr(base.KernelCompressor, "decompress", counted)
    joined, apart, plain = (torch.full((numel,), torch.nan) for _ in range(3))
    decompress_shards_(compressor, joined, bodies, shard)
    assert len(calls) <= 2  # of all whole shards, and of the one that is not
    monkeypatch.setattr(base, "JOINED_BELOW", 0)
    decompress_shards_(compressor, apart, bodies, shard)
    decompress_shards_(Plain(compressor), plain, bodies, shard)  # type: ignore[arg-type]
    assert len(calls) >= 2 * -(-numel // shard)
    assert not plain.isnan().any()
    assert same_bytes(joined, plain)
    assert same_bytes(apart, plain)


def test_nothing() -> None:
    decompress_shards_(gck.Sign(), torch.empty(0), torch.empty(3, 0, dtype=torch.uint8), 0)


def test_a_corrupt_body_is_found() -> None:
    compressor = gck.ChunkTopK(k=3, chunk_size=32, value_bits=32, index_bits=16)
    bodies = bodies_of(compressor, torch.randn(96), 3)
    bodies[1, compressor.layout(32).fields[-1].offset + 1] = 255  # an index beyond the chunk
    out = torch.full((96,), 7.0)
    with pytest.raises(CorruptPayloadError, match="decompress_shards_"):
        decompress_shards_(compressor, out, bodies, 32)
