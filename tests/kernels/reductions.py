"""Reductions of every kind, and what one must do on a backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.compressor import server_of
from gck.kernels.common.reduction import Reduction
from tests.cases import Guarded, make, same_bytes

TOPK = gck.ChunkTopK(k=5, chunk_size=32, value_bits=4)
PACKED = [
    gck.Sign(32),
    gck.Sign(),
    gck.Sign(8192),
    gck.Quantize(8),
    gck.Quantize(4, 32),
    gck.Quantize(4, 64, "stochastic", seed=-3),
    gck.Quantize(2, 128, "stochastic", seed=2**40, first=7 << 35),
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
# The residual fades, and is bounded by what some of its entries exceed.
READ = [
    gck.Sign(64, decay=0.9, clip=0.5),
    gck.Sign(1024, clip=1e-3),
    gck.Quantize(4, 256, decay=0.3),
    gck.Quantize(8, 32, "stochastic", decay=0.5, clip=0.25, seed=0),
    gck.Quantize(2, 2048, scale="mean", clip=0.5),
    gck.ChunkTopK(k=5, chunk_size=32, value_bits=4, decay=0.9, clip=0.5),
    gck.ChunkTopK(k=64, chunk_size=1024, value_bits=2, clip=0.01, server_k=128),
]
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
        clip = None if server.clip is None else torch.tensor([server.clip])
        job = Reduction(rows, compressor.layout(capacity), n, divisor, server, inner, body, nonfinite, clip)
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
