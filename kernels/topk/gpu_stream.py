"""The one pass over grad and err, and the way back: acc is in the list, or else in err."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import widen
from gck.kernels.common.residual import AS_IT_IS, read_residual
from gck.kernels.common.tiles import columns
from gck.kernels.topk.gpu_control import (
    BRACKET_STOP,
    EXPECTED,
    GUESS,
    HALF,
    HALF_MASK,
    LISTED,
    TIE,
    TIES,
)

TILE = 4096  # an index within a tile fits 16 bits
STREAM_WARPS = 8
STREAM_REGISTERS = 80  # three programs on a processor; told no limit, some compilers take more than they need
# A tile has two words: where its candidates begin in the list, and how many they are. Where the bracket has a
# list of its own, the high half of the first says where they begin there, and the high 16 bits of the second
# how many they are.
TILE_WORDS = tl.constexpr(2)
COUNT_MASK = tl.constexpr(0xFFFF)
HALF_BITS = tl.constexpr(16)  # two counts of a tile in 32 bits
HALF_ONE = tl.constexpr(1 << HALF_BITS.value)


@triton.jit
def reaches(b_acc, guess):
    """Keys compare as the numbers do, and NaN, which is not below anything, reaches any guess."""
    return (tl.abs(b_acc) < guess) == 0


@triton.jit
def left_by_stream(b_acc, expected):
    """What the stream leaves in err of what it lists. NaN stays, for nothing compares with it; and all stays
    where the expected key is one."""
    return tl.where(tl.abs(b_acc) >= expected, 0.0, b_acc)


@triton.jit
def key_as_number(p_key):
    return tl.load(p_key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _counts(b_acc, lower, upper, of_lower):
    """What each element adds to the two counts of a tile, each in its half: 1 from `upper` on, of_lower below
    that from `lower` on."""
    return tl.where(reaches(b_acc, lower), tl.where(reaches(b_acc, upper), 1, of_lower), 0)


@triton.jit
def _append(
    p_list, p_locals, p_bracket, b_slot, b_acc, b_local, lower, upper, of_lower, BRACKET: tl.constexpr
):
    """Writes what low halves count to the slots, the low halves of b_slot, and, with BRACKET, what high ones
    count to the bracket's, the high halves; returns those that are free then."""
    b_count = _counts(b_acc, lower, upper, of_lower)
    b_listed = (b_count & COUNT_MASK) != 0
    b_at = b_slot & COUNT_MASK
    tl.store(p_list + b_at, b_acc, mask=b_listed)
    tl.store(p_locals + b_at, b_local.to(tl.int16), mask=b_listed)
    if BRACKET:
        tl.store(p_bracket + (b_slot >> HALF_BITS), b_acc, mask=b_count > COUNT_MASK)
    return b_slot + b_count


@triton.jit
def stream_tile(
    p_grad,
    p_err,
    p_list,
    p_locals,
    p_bracket,
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
    BRACKET: tl.constexpr = False,
    bracket_capacity=0,
):
    """Moves a tile of acc into err, and what reaches the guess into the list as far as it has room.

    The tile has `left` elements, FOURS of them, and is `whole` if that is all; the list begins at `list_at`.
    NaNs stay as they come: they reach any guess, and whatever reads err or the list makes them one.

    With BRACKET, what lies below the bracket's end is also copied to p_bracket, so that the search need not
    read what surely wins; p_bracket has room for a tile past its capacity.
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
        tied = tie > 0
        # The low half counts what is listed. The high half, where there are ties to count, these, which lie
        # just below the guess, down from 0; and else what is listed but lies below the bracket's end.
        lower = tl.where(tied, (tie - 1).to(tl.float32, bitcast=True), guess)
        upper = guess
        of_lower = -HALF_ONE
        if BRACKET:
            upper = tl.where(tied, guess, key_as_number(p_control + BRACKET_STOP))
            of_lower = tl.where(tied, -HALF_ONE, HALF_ONE + 1)
        b_counts = tl.sum(_counts(b_acc, lower, upper, of_lower), 1)
        counts = tl.sum(b_counts, 0)
        count = counts & COUNT_MASK  # never what is outside, for that is 0
        close = counts >> HALF_BITS
        if tied:
            close = -close
        if BRACKET:
            begins = tl.atomic_add(p_control + LISTED, (close.to(tl.int64) << HALF) | count, sem="relaxed")
            base = (begins & HALF_MASK).to(tl.int32)
            # What finds no room goes past the end, where nobody reads.
            p_bracket += tl.minimum((begins >> HALF).to(tl.int32), bracket_capacity)
        else:
            begins = tl.cast(0, tl.int64)
            if tied & (close > 0):
                tl.atomic_add(p_control + TIES, close.to(tl.int64), sem="relaxed")
            if count > 0:
                begins = tl.atomic_add(p_control + LISTED, count.to(tl.int64), sem="relaxed")
            base = begins
        if base + count > capacity:
            counts = tl.cast(0, tl.int32)
            count = tl.cast(0, tl.int32)
        p_tile += tl.cast(i_tile, tl.int64) * TILE_WORDS
        tl.store(p_tile, begins)
        tl.store(p_tile + 1, counts.to(tl.int64))
        if count > 0:
            p_list += list_at + base
            p_locals += list_at + base
            b_slot = tl.cumsum(b_counts, 0) - b_counts
            b_row = tl.arange(0, TILE // 4) * 4
            # A column at a time, so that the threads that hold the elements also store them.
            b_acc_0, b_acc_1, b_acc_2, b_acc_3 = columns(b_acc)
            to = (p_list, p_locals, p_bracket)
            by = (lower, upper, of_lower, BRACKET)
            b_slot = _append(*to, b_slot, b_acc_0, b_row, *by)
            b_slot = _append(*to, b_slot, b_acc_1, b_row + 1, *by)
            b_slot = _append(*to, b_slot, b_acc_2, b_row + 2, *by)
            _append(*to, b_slot, b_acc_3, b_row + 3, *by)
        b_acc = left_by_stream(b_acc, tl.where(count > 0, key_as_number(p_control + EXPECTED), float("nan")))
    if FOURS:
        tl.store(p_errs, b_acc, mask=b_inside)
    elif whole:
        tl.store(p_errs, b_acc)
    else:
        tl.store(p_errs, b_acc, mask=b_local < left)


@triton.jit
def listed_rows(p_tile, first_tile, tiles, ROWS: tl.constexpr, BRACKET: tl.constexpr):
    """(place in the list, length) of the candidates of `tiles` tiles from first_tile on, a row a tile; and of
    those that the bracket's own list has."""
    b_row = tl.arange(0, ROWS)
    p_word = p_tile + (tl.cast(first_tile, tl.int64) + b_row) * TILE_WORDS
    b_begins = tl.load(p_word, mask=b_row < tiles, other=0)
    b_counts = tl.load(p_word + 1, mask=b_row < tiles, other=0).to(tl.int32)
    return _words(b_begins, b_counts, BRACKET)


@triton.jit
def listed_tile(p_tile, i_tile, BRACKET: tl.constexpr):
    """`listed_rows` of one tile."""
    p_word = p_tile + tl.cast(i_tile, tl.int64) * TILE_WORDS
    return _words(tl.load(p_word), tl.load(p_word + 1).to(tl.int32), BRACKET)


@triton.jit
def _words(begins, counts, BRACKET: tl.constexpr):
    if BRACKET:
        return begins & HALF_MASK, counts & COUNT_MASK, begins >> HALF, counts >> HALF_BITS
    else:
        return begins, counts & COUNT_MASK, begins, counts & COUNT_MASK


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
    BRACKET: tl.constexpr,
):
    """Puts the candidates of a run of at most ROWS tiles back into err."""
    b_base, b_length, _base, _length = listed_rows(p_tile, first_tile, tiles, ROWS, BRACKET)
    b_first = (tl.cast(first_tile, tl.int64) + tl.arange(0, ROWS)) * TILE
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_at = b_base[:, None] + b_entry[None, :]
        b_acc = tl.load(p_list + b_at, mask=b_valid, other=0.0)
        b_local = tl.load(p_locals + b_at, mask=b_valid, other=0).to(tl.int32)
        tl.store(p_err + b_first[:, None] + b_local, b_acc, mask=b_valid)
