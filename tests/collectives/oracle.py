"""What the all-reduces must return, in plain torch over the compressors' references."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gck.kernels.reference import read_residual
from tests.cases import one_nan, raw


def reference(compressor: Any) -> Any:
    return import_module(f"{type(compressor).__module__}.reference")


def one_phase(
    compressor: Any, grads: list[Tensor], errs: list[Tensor], op: str, world_size: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(fp32 result, new residual of each rank); world_size: of a mean, where it is not over `grads` alone."""
    n = grads[0].numel()
    total, residuals = torch.zeros(n), []
    for grad, err in zip(grads, errs, strict=True):
        decoded, residual = _message(compressor, grad.reshape(-1), err)
        total = total + decoded
        residuals.append(residual)
    return total / (world_size or len(grads)) if op == "avg" else total, residuals


def two_phase(
    compressor: Any,
    grads: list[Tensor],
    errs: list[Tensor],
    servers: list[Tensor],
    op: str,
    world_size: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(fp32 result, new worker residuals, new server residuals); servers hold the valid part only."""
    valid = valid_numels(grads[0].numel(), compressor.shard_unit, len(grads))
    messages = [_message(compressor, g.reshape(-1), e) for g, e in zip(grads, errs, strict=True)]
    shards = zip(*(decoded.split(valid) for decoded, _ in messages), strict=True)
    parts, new_servers = [], []
    for decoded_shards, server in zip(shards, servers, strict=True):
        total = torch.zeros(server.numel())
        for decoded in decoded_shards:
            total = total + decoded
        if op == "avg":
            total = total / (world_size or len(grads))
        decoded, residual = _message(server_of(compressor, len(grads)), total, server)
        parts.append(decoded)
        new_servers.append(residual)
    return torch.cat(parts), [residual for _, residual in messages], new_servers


def factored(
    compressor: Any,
    grads: list[Tensor],
    errs: list[Tensor],
    basis: Tensor | None,
    op: str,
    world_size: int | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(fp32 result, new residual of each rank, basis of the next step); compressor is bound to a shape."""
    steps, n = reference(compressor), grads[0].numel()
    rows, columns, rank = compressor.shape(n)
    if basis is None or basis.shape != (rank, columns):
        basis = steps.basis(compressor.seed, rank, columns)
    accs = [
        one_nan(g.reshape(-1).float() + read_residual(compressor, e))
        for g, e in zip(grads, errs, strict=True)
    ]
    left = torch.zeros(rank, rows)
    for acc in accs:
        left = left + steps.project(compressor, acc, basis)
    left = steps.orthonormal(left)
    right, residuals = torch.zeros(rank, columns), []
    for acc in accs:
        own = steps.back_project(compressor, acc, left)
        right = right + own
        residual = acc - steps.decompress(compressor, (left, own), n)
        residuals.append(torch.where(residual.isfinite(), residual, 0.0))
    following = basis.clone()
    for j in range(rank):
        peak = float(right[j].abs().max())
        if peak < float("inf"):
            exponent = max(math.frexp(peak)[1] - 1, -127) if peak else -127
            scaled = right[j] * 2.0 ** max(-126, min(127, -1 - exponent))
            astray = torch.tensor([drawn_again(basis, j, c) * 2.0**-12 for c in range(columns)])
            following[j] = scaled + astray
    mean = right / (world_size or len(grads)) if op == "avg" else right
    return steps.decompress(compressor, (left, mean), n), residuals, following


def drawn_again(basis: Tensor, row: int, column: int) -> float:
    """A number in [-1, 1): a hash of what a basis has at a place, and of the place."""
    (bits,) = struct.unpack("<I", struct.pack("<f", float(basis[row, column])))
    mixed = bits ^ (row * basis.shape[1] + column) * 0x9E3779B9 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * factor & 0xFFFFFFFF
    mixed ^= mixed >> 16
    return (mixed >> 8) / 2**23 - 1


def node_sums(grads: list[Tensor], local: int, unit: int | None) -> list[list[Tensor]]:
    """[local rank][node]: the fp32 sum of a node's shards, where nodes of `local` ranks share vectors."""
    valid = valid_numels(grads[0].numel(), unit or 1, local)
    sums = []
    for node in range(0, len(grads), local):
        total = torch.zeros(grads[0].numel())
        for grad in grads[node : node + local]:
            total = total + grad.reshape(-1).float()
        sums.append(total.split(valid))
    return [list(of_rank) for of_rank in zip(*sums, strict=True)]


def valid_numels(n: int, unit: int, world_size: int) -> list[int]:
    """Elements that each rank owns."""
    units = -(-n // unit)
    shard = -(-units // world_size) * unit
    return [max(0, min(n, (r + 1) * shard) - r * shard) for r in range(world_size)]


def server_of(compressor: Any, world_size: int) -> Any:
    """The second phase's compressor."""
    if compressor.name == "chunk_topk":
        k = compressor.server_k or min(compressor.k * min(world_size, 4), compressor.chunk_size // 2)
        return replace(compressor, k=k)
    return compressor.server_for(world_size) if compressor.name == "quantize" else compressor


def _message(compressor: Any, grad: Tensor, err: Tensor) -> tuple[Tensor, Tensor]:
    """(what receivers see, residual)."""
    if grad.numel() == 0:
        return torch.zeros(0), torch.zeros(0)
    fields, residual, _ = reference(compressor).compress(compressor, grad, err)
    return reference(compressor).decompress(compressor, fields, grad.numel()), residual


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bytes, but for the kind of NaN."""
    return a.dtype == b.dtype and a.numel() == b.numel() and torch.equal(raw(one_nan(a)), raw(one_nan(b)))
