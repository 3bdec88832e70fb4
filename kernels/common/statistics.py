"""Partial sums of acc and of the residual that is left, as a compressor's own kernel stores them.

A sum is one of BLOCK numbers, then of BLOCK such sums, and so on, each a halving tree with zeros behind the
last. Partial sums of a vector lie in four rows, a number a block: of |acc|, acc^2, err^2, and how many of acc
are not finite. Those are zeros in the others. See `gck.Statistics`; `gpu_statistics` adds them up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import accumulate, is_finite
from gck.kernels.common.residual import read_residual
from gck.kernels.common.tree import halving_sum

LEVELS = tl.constexpr(9)
BLOCK = tl.constexpr(2**LEVELS.value)


@triton.jit
def blocks_of(n):
    return (n + BLOCK - 1) // BLOCK


@triton.jit
def _by_block(b_x):
    """fp64 of whole BLOCKs in whatever shape, a row each, with 0 for what is not finite; and what is."""
    b_row = tl.reshape(b_x, (b_x.numel // BLOCK, BLOCK))
    b_finite = is_finite(b_row)
    return tl.where(b_finite, b_row, 0.0).to(tl.float64), b_finite


@triton.jit
def _squares(b_row):
    return halving_sum(b_row * b_row, b_row.shape[0], LEVELS)


@triton.jit
def store_acc_sums(p_sums, n, base, b_acc):
    """Stores the partial sums of acc of the elements from `base` on, zeros past the n-th."""
    b_row, b_finite = _by_block(b_acc)
    blocks = blocks_of(tl.cast(n, tl.int64))
    b_block = base // BLOCK + tl.arange(0, b_row.shape[0])
    b_exists = b_block < blocks
    b_wild = tl.sum((b_finite == 0).to(tl.int32), 1)
    tl.store(p_sums + b_block, halving_sum(tl.abs(b_row), b_row.shape[0], LEVELS), mask=b_exists)
    tl.store(p_sums + blocks + b_block, _squares(b_row), mask=b_exists)
    tl.store(p_sums + 3 * blocks + b_block, b_wild.to(tl.float64), mask=b_exists)


@triton.jit
def store_err_sums(p_sums, n, base, b_err):
    """The same of the residual that is left there."""
    b_row, _b_finite = _by_block(b_err)
    blocks = blocks_of(tl.cast(n, tl.int64))
    b_block = base // BLOCK + tl.arange(0, b_row.shape[0])
    tl.store(p_sums + 2 * blocks + b_block, _squares(b_row), mask=b_block < blocks)


@triton.jit
def sum_read(
    p_grad,
    p_err,
    p_sums,
    n,
    base,
    stop,
    decay,
    p_clip,
    SIZE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The partial sums of acc of SIZE elements from the `base`-th on, as far as `stop`, which this program is
    about to read: it then finds them in its cache, where to keep all of them as fp64 would take more
    registers than there are."""
    for first in range(0, SIZE, BLOCK):
        b_at = base + first + tl.arange(0, BLOCK)
        b_inside = b_at < stop
        b_err = tl.load(p_err + b_at, mask=b_inside, other=0.0)
        b_grad = tl.load(p_grad + b_at, mask=b_inside, other=0.0)
        b_acc = accumulate(b_grad, read_residual(b_err, decay, p_clip, RESIDUAL))
        store_acc_sums(p_sums, n, base + first, b_acc)
    tl.debug_barrier()


@triton.jit
def sum_stored(p_err, p_sums, n, base, left, ACC: tl.constexpr):
    """The partial sums of acc, or else of the residual, that this program has just stored to err: of `left`
    elements from the vector's `base`-th on, which lie from p_err on."""
    tl.debug_barrier()
    for first in range(0, left, BLOCK):
        b_local = first + tl.arange(0, BLOCK)
        b_x = tl.load(p_err + b_local, mask=b_local < left, other=0.0)
        if ACC:
            store_acc_sums(p_sums, n, base + first, b_x)
        else:
            store_err_sums(p_sums, n, base + first, b_x)
    tl.debug_barrier()
