"""Low rank with error feedback on the GPU: the matrix is read thrice, by kernels at the rate of its memory.

acc = grad + err is written with the products that make left; left becomes orthonormal in two small kernels;
the products that make right are summed by blocks of rows; and err is acc less what both decode to.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.gpu_statistics import measure_acc, measure_err
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.philox import key_of, uniform
from gck.kernels.low_rank.gpu_back_project import back_project_
from gck.kernels.low_rank.gpu_basis import next_basis
from gck.kernels.low_rank.gpu_decode import product_, settle_
from gck.kernels.low_rank.gpu_orthonormal import orthonormalise_
from gck.kernels.low_rank.gpu_project import project_

__all__ = [
    "back_project_",
    "basis_",
    "compress_",
    "decompress_",
    "next_basis",
    "orthonormalise_",
    "product_",
    "project_",
    "settle_",
]

TILE = 1024  # numbers of a basis, a program
WARPS = 4


@triton.jit(do_not_specialize=["count", "key_0", "key_1"])
def basis_kernel(p_basis, count, key_0, key_1, TILE: tl.constexpr):
    """`count` numbers in [-1, 1): multiples of 2**-23, so that nothing is rounded."""
    first = tl.program_id(0).to(tl.int64) * TILE
    b_at = first + tl.arange(0, TILE)[None, :]
    b_number = uniform(first, key_0, key_1, 1, TILE) * 2 - 1
    tl.store(p_basis + b_at, b_number, mask=b_at < count)


def basis_(compressor: Any, basis: Tensor) -> None:
    count = basis.numel()
    with launching_on(basis):
        basis_kernel[(triton.cdiv(count, TILE),)](
            basis, count, *key_of(compressor.seed), TILE=TILE, num_warps=WARPS, **EXACT
        )


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    n = grad.numel()
    one = compressor.alone(n)
    left, right = compressor.layout(n).views(bodies.view(-1))
    sums = None if stats is None else measure_acc(grad, err, compressor.decay, clip)
    basis = torch.empty_like(right)
    basis_(compressor, basis)
    project_(one, [grad], [err], [basis], [err], [left], clip)
    orthonormalise_(one, [left])
    back_project_(one, [err], [left], [right])
    settle_(one, [err], [err], [left], [right], nonfinite)
    if stats is not None and sums is not None:
        stats.copy_(measure_err(sums, err, n))


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    left, right = fields
    product_(compressor.alone(out.numel()), [out], [left], [right], alpha, accumulate)
