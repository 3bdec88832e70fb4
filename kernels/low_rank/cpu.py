"""The CPU twin of low rank: hands addresses to the compiled kernels (bindings/cpu/low_rank.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.kernels.common.measure import Host
from gck.kernels.common.native import DTYPE_CODE

if TYPE_CHECKING:
    from gck.kernels.low_rank import LowRank
    from gck.kernels.low_rank.matrices import Matrices


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
    one = compressor.alone(numel)
    left, right = compressor.layout(numel).views(bodies.view(-1))
    basis = torch.empty_like(right)
    basis_(compressor, basis)
    sums = None if stats is None else Host.measure_acc(grad, err, compressor.decay, clip)
    project_(one, [grad], [err], [basis], [err], [left], clip)
    orthonormalise_(one, [left])
    back_project_(one, [err], [left], [right])
    settle_(one, [err], [err], [left], [right], nonfinite)
    if stats is not None and sums is not None:
        stats.copy_(Host.measure_err(sums, err, numel))


def decompress_(
    compressor: LowRank, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    left, right = fields
    product_(compressor.alone(out.numel()), [out], [left], [right], alpha, accumulate)


def basis_(compressor: LowRank, basis: Tensor) -> None:
    load().low_rank_basis(compressor.seed, basis.numel(), basis.data_ptr())


def project_(
    matrices: Matrices,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    bases: Sequence[Tensor],
    accs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    clip: Tensor | None,
) -> None:
    matrices.native.project(
        _at(grads),
        [DTYPE_CODE[grad.dtype] for grad in grads],
        _at(errs),
        _at(accs),
        matrices.decay,
        0 if clip is None else clip.data_ptr(),
        _at(bases),
        _at(lefts),
        num_threads(),
    )


def orthonormalise_(matrices: Matrices, lefts: Sequence[Tensor]) -> None:
    matrices.native.orthonormalise(_at(lefts), num_threads())


def back_project_(
    matrices: Matrices, accs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    matrices.native.back_project(_at(accs), _at(lefts), _at(rights), num_threads())


def settle_(
    matrices: Matrices,
    accs: Sequence[Tensor],
    errs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    cleared: Tensor | None,
) -> None:
    counts = 0 if cleared is None else cleared.data_ptr()
    matrices.native.settle(_at(accs), _at(errs), _at(lefts), _at(rights), counts, num_threads())


def product_(
    matrices: Matrices,
    outs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    alpha: float,
    accumulate: bool,
) -> None:
    matrices.native.decompress(_at(lefts), _at(rights), _at(outs), alpha, accumulate, num_threads())


def next_basis(
    matrices: Matrices, bases: Sequence[Tensor], rights: Sequence[Tensor], followings: Sequence[Tensor]
) -> None:
    matrices.native.next_basis(_at(bases), _at(rights), _at(followings), num_threads())


def _at(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
