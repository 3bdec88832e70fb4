"""Packed payloads to the packed payload of their sum: in one pass, the bytes of the oracles in turn."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.compressor import reduce_, reduce_by_steps_, server_of, shard_numel
from gck.errors import (
    ArgumentError,
    CorruptPayloadError,
    DtypeError,
    GckError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.common.reduction import Reduction
from tests.cases import CASES, Guarded, make, same_bytes
from tests.kernels.bits import bit_patterns


@dataclass(frozen=True)
class WiderServer(gck.ChunkTopK):
    """Keeps more of a sum than of an addend."""

    server_k: int = 16

    @property
    def server(self) -> gck.ChunkTopK:
        return gck.ChunkTopK(self.server_k, self.chunk_size, self.value_bits, self.index_bits)


FUSED = [
    gck.Sign(32),
    gck.Sign(),
    gck.Sign(8192),
    gck.Quantize(8),
    gck.Quantize(4, 32),
    gck.Quantize(4, 64, "stochastic", seed=-3),
    gck.Quantize(2, 128, "stochastic", seed=2**40),
    gck.Quantize(2),
    gck.Quantize(2, 8192, scale="mean"),
    gck.Quantize(2, 32, scale="mean"),
]
COMPRESSORS = [
    *FUSED,
    gck.ChunkTopK(),
    gck.ChunkTopK(k=5, chunk_size=32, value_bits=4),
    gck.ChunkTopK(k=7, chunk_size=128, value_bits=2),
    gck.ChunkTopK(k=16, chunk_size=32, value_bits=8, index_bits=16),
    WiderServer(k=4, chunk_size=64, value_bits=32),
    WiderServer(k=300, chunk_size=65536, value_bits=2, server_k=1000),
]


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
            fields = tuple(f[: -(-n // size)] for f, size in zip(fields, (32, compressor.chunk_size), strict=True))
        total = total + reference(compressor).decompress(compressor, fields, n)
    total = total / divisor
    server = server_of(compressor)
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
    server = server_of(compressor)
    out_layout = server.layout(n)
    memory = torch.full((out_layout.nbytes + 48,), 0xA5, dtype=torch.uint8, device=device)
    body = memory[16 : 16 + out_layout.nbytes]
    body.zero_()
    held = None if err is None else Guarded.of(err.to(device))
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    rows = torch.empty_strided(bodies.shape, bodies.stride(), dtype=torch.uint8, device=device)
    rows.copy_(bodies)
    kernels_of(compressor, backend).reduce_(
        compressor,
        Reduction(
            rows,
            compressor.layout(capacity),
            n,
            divisor,
            server,
            None if held is None else held.inner,
            body,
            nonfinite,
        ),
    )
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


BACKENDS = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_ranks(compressor: Any, ranks: int) -> None:
    for n in (1, 33, 4999):
        bodies = payloads(compressor, ranks, n, n)
        check(compressor, "cpu", bodies, n, n, residual(n), 1)
        check(compressor, "cpu", bodies, n, n, residual(n), ranks)
