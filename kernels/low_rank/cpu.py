"""The CPU twin of low rank: hands addresses to the compiled kernels (bindings/cpu/low_rank.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.kernels.common.measure import Host
from gck.kernels.common.native import DTYPE_CODE

if TYPE_CHECKING:
    from gck.kernels.low_rank import LowRank


def compress_(
    compressor: LowRank,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    numel = grad.numel()
    _, columns, rank = compressor.shape(numel)
    left, right = compressor.layout(numel).views(bodies.view(-1))
    basis = torch.empty((rank, columns))
    basis_(compressor, basis)
    sums = None if stats is None else Host.measure_acc(grad, err, compressor.decay, clip)
    project_(compressor, grad, err, basis, left, clip)
    _orthonormalise(left, rank)
    back_project_(compressor, err, left, right)
    settle_(compressor, err, left, right, nonfinite)
    if stats is not None and sums is not None:
        stats.copy_(Host.measure_err(sums, err, numel))


def decompress_(
    compressor: LowRank, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    left, right = fields
    load().low_rank_decompress(
        *_matrix(compressor, out),
        left.data_ptr(),
        right.data_ptr(),
        out.data_ptr(),
        alpha,
        accumulate,
        num_threads(),
    )


def basis_(compressor: LowRank, basis: Tensor) -> None:
    load().low_rank_basis(compressor.seed, basis.numel(), basis.data_ptr())


def project_(
    compressor: LowRank, grad: Tensor, err: Tensor, basis: Tensor, left: Tensor, clip: Tensor | None
) -> None:
    load().low_rank_project(
        *_matrix(compressor, err),
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        compressor.decay,
        0 if clip is None else clip.data_ptr(),
        basis.data_ptr(),
        left.data_ptr(),
        num_threads(),
    )


def orthonormalise_(left: Tensor) -> None:
    _orthonormalise(left, left.shape[0])


def _orthonormalise(left: Tensor, rank: int) -> None:
    load().low_rank_orthonormalise(left.data_ptr(), left.numel() // rank, rank, num_threads())


def back_project_(compressor: LowRank, acc: Tensor, left: Tensor, right: Tensor) -> None:
    load().low_rank_back_project(
        *_matrix(compressor, acc), acc.data_ptr(), left.data_ptr(), right.data_ptr(), num_threads()
    )


def next_basis(basis: Tensor, right: Tensor) -> Tensor:
    following = torch.empty_like(right)
    rank, columns = right.shape
    load().low_rank_next_basis(
        basis.data_ptr(), right.data_ptr(), following.data_ptr(), rank, columns, num_threads()
    )
    return following


def settle_(compressor: LowRank, acc: Tensor, left: Tensor, right: Tensor, nonfinite: Tensor | None) -> None:
    cleared = load().low_rank_settle(
        *_matrix(compressor, acc), acc.data_ptr(), left.data_ptr(), right.data_ptr(), num_threads()
    )
    if nonfinite is not None:
        nonfinite += cleared


def _matrix(compressor: LowRank, flat: Tensor) -> tuple[int, int, int]:
    """(numel, columns, rank)"""
    _, columns, rank = compressor.shape(flat.numel())
    return flat.numel(), columns, rank
