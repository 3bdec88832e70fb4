"""Selection from small chunks: a program holds the keys of several, a row each, and bisects all together."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.chunk_topk.gpu_rank import halve, ranked
from gck.kernels.common.division import divided
from gck.kernels.common.keys import INFINITY, accumulate, magnitude_key, widen
from gck.kernels.common.residual import read_residual


@triton.jit
def _group_floor(b_key, ROWS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """The least of GROUPS group maxima of each row: at least GROUPS of its keys reach it."""
    b_maximum = tl.max(tl.reshape(b_key, (ROWS, SIZE // GROUPS, GROUPS)), 1)
    # By way of a column, because Triton 3.6 fails on the floor that comes from one reduction of another: it
    # makes it anew in the layout of each use, and loses count of those.
    return tl.reshape(tl.maximum(tl.min(b_maximum, 1, keep_dims=True), 0), (ROWS,))


@triton.jit
def select_rows(
    p_grad,
    p_err,
    p_position,
    left,
    number,
    decay,
    p_clip,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Moves acc of CHUNKS chunks, of which `left` elements exist, to err; writes the positions of the
    largest, STRIDE a chunk. Returns how many those are, by chunk, and whether anything is not finite."""
    CHUNK: tl.constexpr = 2**LEVELS
    b_row = tl.arange(0, CHUNKS)
    b_local = tl.arange(0, CHUNK)[None, :]
    b_offset = b_row[:, None] * CHUNK + b_local
    # Only the keys stay in registers: what is selected is read back.
    if WHOLE:
        b_err = read_residual(tl.load(p_err + b_offset), decay, p_clip, RESIDUAL)
        b_acc = accumulate(divided(widen(tl.load(p_grad + b_offset)), number, DIVISION), b_err)
        tl.store(p_err + b_offset, b_acc)
        b_key = magnitude_key(b_acc)
        b_wanted = tl.full((CHUNKS,), K, tl.int32)
    else:
        b_inside = b_offset < left
        b_grad = divided(widen(tl.load(p_grad + b_offset, mask=b_inside, other=0.0)), number, DIVISION)
        b_err = tl.load(p_err + b_offset, mask=b_inside, other=0.0)
        b_acc = accumulate(b_grad, read_residual(b_err, decay, p_clip, RESIDUAL))
        tl.store(p_err + b_offset, b_acc, mask=b_inside)
        b_key = tl.where(b_inside, magnitude_key(b_acc), -1)
        b_wanted = tl.minimum(tl.maximum(left - b_row * CHUNK, 0), K)

    b_low = _group_floor(b_key, CHUNKS, CHUNK, GROUPS)
    b_high = tl.max(b_key, 1) + 1
    wild = tl.max(b_high, 0) > INFINITY
    b_at_low = tl.sum((b_key >= b_low[:, None]).to(tl.int32), 1)
    b_above = tl.zeros((CHUNKS,), tl.int32)
    while tl.max(((b_at_low > b_wanted) & (b_high - b_low > 1)).to(tl.int32), 0) > 0:
        b_middle = b_low + (b_high - b_low) // 2
        b_reach = tl.sum((b_key >= b_middle[:, None]).to(tl.int32), 1)
        b_low, b_high, b_at_low, b_above = halve(
            b_low, b_high, b_at_low, b_above, b_middle, b_reach, b_wanted
        )

    b_quota = tl.where(b_at_low > b_wanted, b_wanted - b_above, CHUNK)[:, None]
    b_wins, b_slot = ranked(b_key, b_low[:, None], b_quota, 1)
    tl.store(p_position + b_row[:, None] * STRIDE + b_slot, b_local.to(tl.int16), mask=b_wins)
    return b_wanted, wild
