"""Selection from a chunk that a program has for itself: list what reaches a floor, rank the short list.

The floor is a key that at least as many of the maxima of many groups reach as entries are wanted, and hardly
more: so many elements reach it at least, and few others. Only the maxima of rows of 4 elements stay in
registers, and only the rows that reach the floor are read again. Where the list has no room for all of them,
because one key fills the chunk or what is large lies in few groups, the chunk is walked again and again.

acc lies in err meanwhile, that is in a cache. NaNs stay there as they come: as keys they are one, for an
addition made them, which leaves no signalling ones below the quiet one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.chunk_topk.gpu_rank import halve, ranked
from gck.kernels.common.division import divided
from gck.kernels.common.keys import INFINITY, QUIET_NAN, magnitude_key, widen
from gck.kernels.common.residual import read_residual
from gck.kernels.common.tiles import columns

MAX_SCAN = tl.constexpr(2048)


@triton.jit
def _group_maxima(b_row, GROUPS: tl.constexpr):
    """Maxima of GROUPS groups of rows; which, is free: those that a thread holds."""
    return tl.max(tl.reshape(b_row, (b_row.numel // GROUPS, GROUPS)), 0)


@triton.jit
def _find_floor(b_most, most, wanted):
    """A key that at least `wanted` of the maxima reach, if so many are there, and hardly more."""
    GROUPS: tl.constexpr = b_most.shape[0]
    enough = wanted + wanted // 4
    low = tl.min(b_most, 0)
    high = most + 1
    at_low = wanted * 0 + GROUPS
    while (at_low > enough) & (high - low > 1):
        middle = low + (high - low) // 2
        reach = tl.sum((b_most >= middle).to(tl.int32), 0)
        low, high, at_low, _ = halve(low, high, at_low, 0, middle, reach, wanted)
    return low


@triton.jit
def _accumulate_rows(
    p_grad,
    p_err,
    number,
    decay,
    p_clip,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Moves SIZE elements of acc to err, PART at a time; returns the largest key of each row of 4."""
    if SIZE > PART:
        HALF: tl.constexpr = SIZE // 2
        options = (number, decay, p_clip)
        b_lower = _accumulate_rows(p_grad, p_err, *options, HALF, PART, DIVISION, RESIDUAL)
        b_upper = _accumulate_rows(p_grad + HALF, p_err + HALF, *options, HALF, PART, DIVISION, RESIDUAL)
        return tl.reshape(tl.permute(tl.join(b_lower, b_upper), (1, 0)), (SIZE // 4,))
    else:
        b_local = tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        b_err = read_residual(tl.load(p_err + b_local), decay, p_clip, RESIDUAL)
        b_acc = divided(widen(tl.load(p_grad + b_local)), number, DIVISION) + b_err
        tl.store(p_err + b_local, b_acc)
        return tl.minimum(tl.max(magnitude_key(b_acc), 1), QUIET_NAN)


@triton.jit
def _accumulate_short(
    p_grad,
    p_err,
    left,
    number,
    decay,
    p_clip,
    STEP: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Moves acc of a chunk that is short of elements to err; returns the largest keys of STEP groups."""
    # In small steps, because masks take registers.
    b_most = tl.zeros((STEP,), tl.int32)
    for first in range(0, left, STEP):
        b_local = first + tl.arange(0, STEP)
        b_inside = b_local < left
        b_acc = divided(widen(tl.load(p_grad + b_local, mask=b_inside, other=0.0)), number, DIVISION)
        b_err = tl.load(p_err + b_local, mask=b_inside, other=0.0)
        b_acc += read_residual(b_err, decay, p_clip, RESIDUAL)
        tl.store(p_err + b_local, b_acc, mask=b_inside)
        b_most = tl.maximum(b_most, magnitude_key(b_acc))
    return tl.minimum(b_most, QUIET_NAN)


@triton.jit
def _append(p_list, b_before, b_class, b_local, quota):
    """Writes those that win of a column, before whose elements lie b_before of both classes."""
    b_ties = b_before >> 16
    b_wins = (b_class == 1) | ((b_class > 1) & (b_ties < quota))
    b_slot = (b_before & 0xFFFF) + tl.minimum(b_ties, quota)
    tl.store(p_list + b_slot, b_local.to(tl.int16), mask=b_wins)
    return b_before + b_class


@triton.jit
def _count(b_key, middle):
    return tl.sum(tl.sum((b_key >= middle).to(tl.int32), 1), 0)


@triton.jit
def _list_rows(p_list, b_row, first, floor, found, CAPACITY: tl.constexpr):
    """Appends the rows, from `first` on, that reach the floor, if there is room; returns the length then."""
    # A scan over more, of many warps, takes more registers than there are.
    if b_row.numel > MAX_SCAN:
        b_lower, b_upper = tl.split(tl.permute(tl.reshape(b_row, (2, b_row.numel // 2)), (1, 0)))
        found = _list_rows(p_list, b_lower, first, floor, found, CAPACITY)
        found = _list_rows(p_list, b_upper, first + b_row.numel // 2, floor, found, CAPACITY)
    else:
        b_one = (b_row >= floor).to(tl.int32)
        b_slot = found + tl.cumsum(b_one, 0) - 1
        found += tl.sum(b_one, 0)
        if found <= CAPACITY:
            b_index = first + tl.arange(0, b_row.numel)
            tl.store(p_list + b_slot, b_index.to(tl.int16), mask=b_one > 0)
    return found


@triton.jit
def _rank_list(p_err, p_list, rows, low, high, wanted, CAPACITY: tl.constexpr):
    """Puts the positions of the winners in the place of the listed rows, which hold all that reach low."""
    b_index = tl.arange(0, CAPACITY)
    b_row = tl.load(p_list + b_index, mask=b_index < rows, other=0).to(tl.int32) * 4
    b_live = (b_index < rows)[:, None]
    b_acc = tl.load(p_err + b_row[:, None] + tl.arange(0, 4)[None, :], mask=b_live, other=0.0)
    b_key = tl.where(b_live, tl.minimum(magnitude_key(b_acc), QUIET_NAN), -1)
    tl.debug_barrier()  # before anything is overwritten
    at_low = wanted * 0 + 4 * CAPACITY + 1  # not counted yet
    above = wanted * 0
    while (at_low > wanted) & (high - low > 1):
        middle = low + (high - low) // 2
        reach = _count(b_key, middle)
        low, high, at_low, above = halve(low, high, at_low, above, middle, reach, wanted)

    quota = tl.where(at_low > wanted, wanted - above, 4 * CAPACITY)
    # Both classes in one number: 1 for what lies above the last key, 65536 for what equals it.
    b_class = tl.where(b_key > low, 1, tl.where(b_key == low, 65536, 0))
    b_classes = tl.sum(b_class, 1)
    b_before = tl.cumsum(b_classes, 0) - b_classes
    # A column at a time, so that the threads that hold the elements also store them.
    b_class_0, b_class_1, b_class_2, b_class_3 = columns(b_class)
    b_before = _append(p_list, b_before, b_class_0, b_row, quota)
    b_before = _append(p_list, b_before, b_class_1, b_row + 1, quota)
    b_before = _append(p_list, b_before, b_class_2, b_row + 2, quota)
    _append(p_list, b_before, b_class_3, b_row + 3, quota)


@triton.jit
def _keys_of_step(p_err, first, left, STEP: tl.constexpr):
    """Keys of a part of a chunk, -1 past its `left` elements."""
    b_local = first + tl.arange(0, STEP)
    if first + STEP <= left:
        b_key = magnitude_key(tl.load(p_err + b_local))
    else:
        b_inside = b_local < left
        b_key = tl.where(b_inside, magnitude_key(tl.load(p_err + b_local, mask=b_inside, other=0.0)), -1)
    return tl.minimum(b_key, QUIET_NAN)


@triton.jit
def _rank_chunk(p_err, p_list, left, low, high, wanted, STEP: tl.constexpr):
    """`_rank_list` without a list: all `left` elements are looked at, over and over."""
    # At least `wanted` reach low; how many is not known, so that the first step must be taken. Where there
    # are too many for a list, most are equal to low as a rule: so it only asks what lies above.
    at_low = left + 1
    above = wanted * 0
    middle = low + 1
    while (at_low > wanted) & (high - low > 1):
        b_reach = tl.zeros((STEP,), tl.int32)
        for first in range(0, left, STEP):
            b_reach += (_keys_of_step(p_err, first, left, STEP) >= middle).to(tl.int32)
        reach = tl.sum(b_reach, 0)
        low, high, at_low, above = halve(low, high, at_low, above, middle, reach, wanted)
        middle = low + (high - low) // 2

    # A chunk whose interval had no inside at once was not counted: then no key is above low.
    quota = tl.where(at_low > wanted, wanted - above, left)
    position = wanted * 0
    for first in range(0, left, STEP):
        b_key = _keys_of_step(p_err, first, left, STEP)
        b_wins, b_slot = ranked(b_key, low, quota, 0)
        b_local = first + tl.arange(0, STEP)
        tl.store(p_list + position + b_slot, b_local.to(tl.int16), mask=b_wins)
        ties = tl.minimum(tl.sum((b_key == low).to(tl.int32), 0), quota)
        position += tl.sum((b_key > low).to(tl.int32), 0) + ties
        quota -= ties


@triton.jit
def select_chunk(
    p_grad,
    p_err,
    p_list,
    left,
    number,
    decay,
    p_clip,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Moves acc of a chunk, of `divided` grad and err, of which `left` elements exist, to err; writes the
    positions of the largest. Returns how many those are, and whether anything is not finite."""
    CHUNK: tl.constexpr = 2**LEVELS
    wanted = tl.minimum(left, K)
    # With fewer groups than entries only zero is surely reached by enough.
    low = wanted * 0
    rows = wanted * 0 + CAPACITY + 1
    if left == CHUNK:
        b_row = _accumulate_rows(p_grad, p_err, number, decay, p_clip, CHUNK, PART, DIVISION, RESIDUAL)
        b_most = _group_maxima(b_row, GROUPS)
        most = tl.max(b_most, 0)
        if GROUPS >= K:
            low = _find_floor(b_most, most, wanted)
        if CAPACITY > 0:
            rows = _list_rows(p_list, b_row, 0, low, wanted * 0, CAPACITY)
    else:
        b_part = _accumulate_short(p_grad, p_err, left, number, decay, p_clip, STEP, DIVISION, RESIDUAL)
        most = tl.max(b_part, 0)
        if STEP >= K:
            low = tl.min(b_part, 0)
    tl.debug_barrier()
    if CAPACITY == 0:
        _rank_chunk(p_err, p_list, left, low, most + 1, wanted, STEP)
    elif rows <= CAPACITY:
        _rank_list(p_err, p_list, rows, low, most + 1, wanted, CAPACITY)
    else:
        _rank_chunk(p_err, p_list, left, low, most + 1, wanted, STEP)
    return wanted, most >= INFINITY
