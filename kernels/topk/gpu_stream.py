"""The one pass over grad and err, and the way back: acc is in the list, or else in err."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import widen
from gck.kernels.common.residual import AS_IT_IS, read_residual
from gck.kernels.common.tiles import columns
from gck.kernels.topk.gpu_control import EXPECTED, GUESS, LISTED, TIE, TIES

TILE = 4096  # an index within a tile fits 16 bits
STREAM_WARPS = 8
STREAM_REGISTERS = 80  # three programs on a processor; told no limit, some compilers take more than they need
# A tile's word: where its candidates begin in the list, and how many they are.
COUNT_BITS = tl.constexpr(16)
COUNT_MASK = tl.constexpr(0xFFFF)


@triton.jit
def reaches(b_acc, guess):
    """Keys compare as the numbers do, and NaN, which is not below anything, reaches any guess."""
    return (tl.abs(b_acc) < guess) == 0


@triton.jit
def left_by_stream(b_acc, expected):
    """What the stream leaves in err of what it lists."""
    return tl.where(reaches(b_acc, expected), 0.0, b_acc)


@triton.jit
def key_as_number(p_key):
    return tl.load(p_key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _append(p_list, p_locals, b_slot, b_acc, b_local, guess):
    """Writes what reaches the guess to the slots; returns those that are free then."""
    b_reaches = reaches(b_acc, guess)
    tl.store(p_list + b_slot, b_acc, mask=b_reaches)
    tl.store(p_locals + b_slot, b_local.to(tl.int16), mask=b_reaches)
    return b_slot + b_reaches.to(tl.int32)


@triton.jit
def stream_tile(
    p_grad,
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_control,
    i_tile,
    left,
    whole,
    list_at,
    capacity,
    TILE: tl.constexpr,
    LISTING: tl.constexpr,
    decay=1.0,
    p_clip=None,
    RESIDUAL: tl.constexpr = AS_IT_IS,
    FOURS: tl.constexpr = False,
):
    """Moves a tile of acc into err, and what reaches the guess into the list as far as it has room.

    The tile has `left` elements, FOURS of them, and is `whole` if that is all; the list begins at `list_at`.
    NaNs stay as they come: they reach any guess, and whatever reads err or the list makes them one.
    """
    start = tl.cast(i_tile, tl.int64) * TILE
    # Rows of 4 elements, 16 bytes of err, which one thread holds.
    b_local = tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    p_grads = p_grad + start + b_local
    p_errs = p_err + start + b_local
    # A mask that ends at just any n would make the compiler load element by element.
    if FOURS:
        b_inside = (tl.arange(0, TILE // 4)[:, None] * 4 + tl.zeros((1, 4), tl.int32)) < left
        b_acc = widen(tl.load(p_grads, mask=b_inside, other=0.0))
        b_acc += read_residual(tl.load(p_errs, mask=b_inside, other=0.0), decay, p_clip, RESIDUAL)
    elif whole:
        b_acc = widen(tl.load(p_grads)) + read_residual(tl.load(p_errs), decay, p_clip, RESIDUAL)
    else:
        b_inside = b_local < left
        b_acc = widen(tl.load(p_grads, mask=b_inside, other=0.0))
        b_acc += read_residual(tl.load(p_errs, mask=b_inside, other=0.0), decay, p_clip, RESIDUAL)
    if LISTING:
        guess = key_as_number(p_control + GUESS)
        tie = tl.load(p_control + TIE).to(tl.int32)
        if tie > 0:
            b_ties = tl.abs(b_acc) == (tie - 1).to(tl.float32, bitcast=True)
            ties = tl.sum(tl.sum(b_ties.to(tl.int32), 1), 0)
            if tie == 1:
                ties -= TILE - left
            if ties > 0:
                tl.atomic_add(p_control + TIES, ties.to(tl.int64), sem="relaxed")
        b_reaches = reaches(b_acc, guess)  # never what is outside, for that is 0
        b_ones = tl.sum(b_reaches.to(tl.int32), 1)
        count = tl.sum(b_ones, 0)
        base = tl.cast(0, tl.int64)
        if count > 0:
            base = tl.atomic_add(p_control + LISTED, count.to(tl.int64), sem="relaxed")
            if base + count <= capacity:
                p_list += list_at + base
                p_locals += list_at + base
                b_slot = tl.cumsum(b_ones, 0) - b_ones
                b_row = tl.arange(0, TILE // 4) * 4
                # A column at a time, so that the threads that hold the elements also store them.
                b_acc_0, b_acc_1, b_acc_2, b_acc_3 = columns(b_acc)
                b_slot = _append(p_list, p_locals, b_slot, b_acc_0, b_row, guess)
                b_slot = _append(p_list, p_locals, b_slot, b_acc_1, b_row + 1, guess)
                b_slot = _append(p_list, p_locals, b_slot, b_acc_2, b_row + 2, guess)
                _append(p_list, p_locals, b_slot, b_acc_3, b_row + 3, guess)
                b_acc = left_by_stream(b_acc, key_as_number(p_control + EXPECTED))
            else:
                count = tl.cast(0, tl.int32)
        tl.store(p_tile + i_tile, (base << COUNT_BITS) | count)
    if FOURS:
        tl.store(p_errs, b_acc, mask=b_inside)
    elif whole:
        tl.store(p_errs, b_acc)
    else:
        tl.store(p_errs, b_acc, mask=b_local < left)


@triton.jit
def listed_rows(p_tile, first_tile, tiles, ROWS: tl.constexpr):
    """(place in the list, length) of the candidates of `tiles` tiles from first_tile on, a row a tile."""
    b_row = tl.arange(0, ROWS)
    b_word = tl.load(p_tile + first_tile + b_row, mask=b_row < tiles, other=0)
    return b_word >> COUNT_BITS, (b_word & COUNT_MASK).to(tl.int32)


@triton.jit
def restore_run(
    p_err,
    p_list,
    p_locals,
    p_tile,
    first_tile,
    tiles,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts the candidates of a run of at most ROWS tiles back into err."""
    b_base, b_length = listed_rows(p_tile, first_tile, tiles, ROWS)
    b_first = (tl.cast(first_tile, tl.int64) + tl.arange(0, ROWS)) * TILE
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_at = b_base[:, None] + b_entry[None, :]
        b_acc = tl.load(p_list + b_at, mask=b_valid, other=0.0)
        b_local = tl.load(p_locals + b_at, mask=b_valid, other=0).to(tl.int32)
        tl.store(p_err + b_first[:, None] + b_local, b_acc, mask=b_valid)
