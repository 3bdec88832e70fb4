"""Where the next step starts from. A program owns a row, which it reads twice: it is as small as a factor."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import INFINITY, magnitude_key
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.low_rank.gpu_many import launches, tensor_of

__all__ = ["next_basis"]

BLOCK = 1024  # numbers at a time
WARPS = 4
# How much a basis gets of the numbers of `_drawn_again`, beside rows whose largest numbers are about one.
ASTRAY = tl.constexpr(2.0**-12)


@triton.jit
def _drawn_again(b_basis, b_place):
    """Other numbers in [-1, 1) than those of the basis: hashes of their bits and of their places.

    Source: Appleby, MurmurHash3 (2011), the finalizer of 32 bits.
    """
    b_mixed = b_basis.to(tl.uint32, bitcast=True) ^ (b_place.to(tl.uint32) * 0x9E3779B9)
    b_mixed = (b_mixed ^ (b_mixed >> 16)) * 0x85EBCA6B
    b_mixed = (b_mixed ^ (b_mixed >> 13)) * 0xC2B2AE35
    b_mixed = b_mixed ^ (b_mixed >> 16)
    return (b_mixed >> 8).to(tl.float32) * (2.0**-23) - 1.0


@triton.jit(do_not_specialize=["columns"])
def next_basis_kernel(
    p_basis, p_right, p_following, p_table, columns, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    p_basis = tensor_of(p_basis, p_table, 0, 3, KIND)
    p_right = tensor_of(p_right, p_table, 1, 3, KIND)
    p_following = tensor_of(p_following, p_table, 2, 3, KIND)
    columns = tl.cast(columns, tl.int64)
    first = tl.program_id(0) * columns
    blocks = ((columns + BLOCK - 1) // BLOCK).to(tl.int32)
    b_peak = tl.zeros((BLOCK,), tl.int32)
    for i in range(blocks):
        b_column = tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_right = tl.load(p_right + first + b_column, mask=b_column < columns, other=0.0)
        b_peak = tl.maximum(b_peak, magnitude_key(b_right))
    peak = tl.max(b_peak, 0)
    exponent = tl.maximum(253 - (peak >> 23), 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    for i in range(blocks):
        b_column = tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_inside = b_column < columns
        b_at = first + b_column
        b_basis = tl.load(p_basis + b_at, mask=b_inside, other=0.0)
        b_right = tl.load(p_right + b_at, mask=b_inside, other=0.0)
        b_next = b_right * scale + _drawn_again(b_basis, b_at) * ASTRAY
        tl.store(p_following + b_at, tl.where(peak < INFINITY, b_next, b_basis), mask=b_inside)


def next_basis(
    matrices: Any, bases: Sequence[Tensor], rights: Sequence[Tensor], followings: Sequence[Tensor]
) -> None:
    with launching_on(rights[0]):
        for _, (_, columns, rank), _, count, tensors, table, kind in launches(
            matrices, bases, rights, followings
        ):
            next_basis_kernel[(rank, 1, count)](
                *tensors, table, columns, BLOCK=BLOCK, KIND=kind, num_warps=WARPS, **EXACT
            )
