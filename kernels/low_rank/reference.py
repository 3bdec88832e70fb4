"""The oracle of low rank: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gck.kernels.quantize.reference import uniform
from gck.kernels.reference import read_residual

LANES = 64  # sums that the products of a row are added to in turn, before they are added up
ROW_BLOCK = 256  # rows whose products are added one after the other
GRAM_LANES = 1024
# Of a row, the part of its squares that must be left when its share of the rows before it is taken away.
LEAST_LEFT = 2.0**-40


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Returns ((left, right), new residual, entries cleared because not finite)."""
    n = grad.numel()
    _, columns, rank = compressor.shape(n)
    acc = _one_nan(grad.reshape(-1).float() + read_residual(compressor, err))
    left = orthonormal(project(compressor, acc, basis(compressor.seed, rank, columns)))
    right = back_project(compressor, acc, left)
    fields = (left.reshape(-1), right.reshape(-1))
    residual = acc - decompress(compressor, fields, n)
    finite = residual.isfinite()
    return fields, torch.where(finite, residual, 0.0), int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, Tensor], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    rows, columns, rank = compressor.shape(numel)
    left, right = fields[0].reshape(rank, rows), fields[1].reshape(rank, columns)
    dense = torch.zeros(rows, columns)
    for j in range(rank):
        dense = dense + left[j][:, None] * right[j]
    return dense.view(-1)[:numel]


def basis(seed: int, rank: int, columns: int) -> Tensor:
    """(rank, columns) fp32: numbers in [-1, 1), by the seed."""
    return (2 * uniform(seed, rank * columns) - 1).view(rank, columns)


def project(compressor: Any, acc: Tensor, basis: Tensor) -> Tensor:
    """(rank, rows) fp32: products of each row with each row of the basis."""
    rows, columns, rank = compressor.shape(acc.numel())
    matrix = pad(acc, (0, rows * columns - acc.numel())).view(rows, columns)
    matrix, basis = pad(matrix, (0, -columns % LANES)), pad(basis, (0, -columns % LANES))
    lanes = torch.zeros(rank, rows, LANES)
    for part, factors in zip(matrix.split(LANES, 1), basis.split(LANES, 1), strict=True):
        lanes = lanes + part * factors[:, None]
    return _one_nan(_tree(lanes))


def orthonormal(left: Tensor) -> Tensor:
    """(rank, rows) fp32: orthonormal rows that span those of `left`, by the Cholesky factor of their products
    in fp64. A row that is all but a combination of those before it is replaced by zeros. Twice: once leaves
    rows whose angles are off where they were nearly in one plane."""
    return _orthonormal(_orthonormal(left))


def _orthonormal(left: Tensor) -> Tensor:
    rank, rows = left.shape
    wide = left.double()
    lanes = torch.zeros(rank, rank, GRAM_LANES, dtype=torch.float64)
    for part in pad(wide, (0, -rows % GRAM_LANES)).split(GRAM_LANES, 1):
        lanes = lanes + part[:, None] * part
    gram = _tree(lanes)
    squares = gram.diagonal().clone()
    for j in range(rank):
        pivot = float(gram[j, j])
        if pivot < LEAST_LEFT * squares[j] or pivot == 0:
            wide[j] = 0
            continue
        root = math.sqrt(pivot)  # rounded correctly, which torch's need not be: MKL has one that is not
        factor = gram[:, j] / root
        factor[: j + 1] = 0
        gram = gram - factor[:, None] * factor
        wide[j] = wide[j] / root
        for k in range(j + 1, rank):
            wide[k] = wide[k] - factor[k] * wide[j]
    return _one_nan((wide + 0.0).float())


def back_project(compressor: Any, acc: Tensor, left: Tensor) -> Tensor:
    """(rank, columns) fp32: products of each row of `left` with each column."""
    rows, columns, rank = compressor.shape(acc.numel())
    matrix = pad(acc, (0, rows * columns - acc.numel())).view(rows, columns)
    right = torch.zeros(rank, columns)
    for start in range(0, rows, ROW_BLOCK):
        part = torch.zeros(rank, columns)
        for i in range(start, min(rows, start + ROW_BLOCK)):
            part = part + matrix[i] * left[:, i, None]
        right = right + part
    return _one_nan(right)


def _tree(lanes: Tensor) -> Tensor:
    """The sums of the last dimension: the upper half is added to the lower, and so on."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), math.nan, x)


def next_basis(basis: Tensor, right: Tensor) -> Tensor:
    """Rows of right, each times the power of two that brings its largest entry near one, and a little of
    `drawn_again`; where one is not finite, that of basis."""
    peak = right.abs().amax(1, keepdim=True)
    exponent = peak.view(torch.int32) >> 23
    scale = ((253 - exponent).clamp(1, 254) << 23).view(torch.float32)
    return torch.where(peak.isfinite(), right * scale + drawn_again(basis) * 2.0**-12, basis)


def drawn_again(basis: Tensor) -> Tensor:
    """Other numbers in [-1, 1) than those of basis: hashes of their bits and places."""
    places = torch.arange(basis.numel(), device=basis.device).view(basis.shape)
    mixed = (basis.view(torch.int32).long() ^ places * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() * 2.0**-23 - 1
