"""Selection from a chunk that is walked in tiles: list what reaches a floor, then rank the short list.

The floor is a key that at least as many of the maxima of many groups reach as entries are wanted, and hardly
more: so many elements reach it at least, and few others. Where the list has no room for all, because one
key fills the chunk or what is large lies in few groups, the chunk is walked again and again instead.

acc lies in err meanwhile, that is in a cache. NaNs stay there as they come.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.chunk_topk.gpu_rank import halve, ranked
from gck.kernels.common.keys import INFINITY, QUIET_NAN, magnitude_key, widen
from gck.kernels.common.tiles import columns


@triton.jit
def _load_tile(p_tile, b_local, left, WHOLE: tl.constexpr):
    """A tile of rows of 4, of which `left` elements exist, 0 past them; a WHOLE one goes without a mask."""
    if WHOLE:
        return tl.load(p_tile + b_local)
    else:
        return tl.load(p_tile + b_local, mask=b_local < left, other=0.0)


@triton.jit
def _accumulate_tile(p_grad, p_err, b_local, left, WHOLE: tl.constexpr):
    """Moves a tile of acc to err."""
    b_acc = widen(_load_tile(p_grad, b_local, left, WHOLE)) + _load_tile(p_err, b_local, left, WHOLE)
    if WHOLE:
        tl.store(p_err + b_local, b_acc)
    else:
        tl.store(p_err + b_local, b_acc, mask=b_local < left)
    return b_acc


@triton.jit
def _group_maxima(b_most, GROUPS: tl.constexpr):
    """Maxima of GROUPS groups of a tile of rows of 4; which, is free: those that a thread holds."""
    if b_most.numel >= 4 * GROUPS:
        b_most = tl.max(b_most, 1)
    b_most = tl.max(tl.reshape(b_most, (b_most.numel // GROUPS, GROUPS)), 0)
    # NaNs are one key: an addition made them, which leaves no signalling ones below.
    return tl.minimum(b_most, QUIET_NAN)


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
def _append(p_list, b_slot, b_one, b_local):
    tl.store(p_list + b_slot, b_local.to(tl.int16), mask=b_one > 0)
    return b_slot + b_one


@triton.jit
def _list_tile(
    p_list, b_acc, b_local, first, left, floor, found, CAPACITY: tl.constexpr, WHOLE: tl.constexpr
):
    """Appends the positions of what reaches the floor, if the list has room; returns its length then."""
    # Keys compare as the numbers do, and NaN, which is not below anything, reaches any floor.
    b_reaches = (tl.abs(b_acc) < floor.to(tl.float32, bitcast=True)) == 0
    if not WHOLE:
        b_reaches &= b_local < left
    b_one = b_reaches.to(tl.int32)
    b_ones = tl.sum(b_one, 1)
    count = tl.sum(b_ones, 0)
    if found + count <= CAPACITY:
        b_slot = found + tl.cumsum(b_ones, 0) - b_ones
        b_row = first + tl.arange(0, b_acc.shape[0]) * 4
        # A column at a time, so that the threads that hold the elements also store them.
        b_one_0, b_one_1, b_one_2, b_one_3 = columns(b_one)
        b_slot = _append(p_list, b_slot, b_one_0, b_row)
        b_slot = _append(p_list, b_slot, b_one_1, b_row + 1)
        b_slot = _append(p_list, b_slot, b_one_2, b_row + 2)
        _append(p_list, b_slot, b_one_3, b_row + 3)
    return found + count


@triton.jit
def _list_chunk(
    p_grad,
    p_err,
    p_list,
    left,
    wanted,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Moves acc to err and lists what reaches a floor. Returns the floor, the largest key and the length of
    the list: if that is above CAPACITY, it lacks some."""
    HELD: tl.constexpr = WHOLE and TILE == 2**LEVELS
    b_local = tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if HELD:
        b_acc = _accumulate_tile(p_grad, p_err, b_local, left, WHOLE)
        b_most = magnitude_key(b_acc)
    else:
        b_most = tl.zeros((TILE // 4, 4), tl.int32)
        for first in range(0, left, TILE):
            b_acc = _accumulate_tile(p_grad + first, p_err + first, b_local, left - first, WHOLE)
            b_most = tl.maximum(b_most, magnitude_key(b_acc))
    b_most = _group_maxima(b_most, GROUPS)
    most = tl.max(b_most, 0)
    # With fewer groups than entries only zero is surely reached by enough.
    low = wanted * 0
    if GROUPS >= K:
        low = _find_floor(b_most, most, wanted)

    found = wanted * 0
    if CAPACITY == 0:
        found += 1
    elif HELD:
        found = _list_tile(p_list, b_acc, b_local, 0, left, low, found, CAPACITY, WHOLE)
    else:
        tl.debug_barrier()
        first = wanted * 0
        while (first < left) & (found <= CAPACITY):
            b_acc = _load_tile(p_err + first, b_local, left - first, WHOLE)
            found = _list_tile(p_list, b_acc, b_local, first, left - first, low, found, CAPACITY, WHOLE)
            first += TILE
    return low, most, found


@triton.jit
def _rank_list(p_err, p_list, found, low, high, wanted, CAPACITY: tl.constexpr):
    """Leaves the winners in the list, where all are that reach low."""
    b_entry = tl.arange(0, CAPACITY)
    b_live = b_entry < found
    b_position = tl.load(p_list + b_entry, mask=b_live, other=0)
    p_entry = p_err + (b_position.to(tl.int32) & 0xFFFF)
    b_key = tl.minimum(magnitude_key(tl.load(p_entry, mask=b_live, other=0.0)), QUIET_NAN)
    b_key = tl.where(b_live, b_key, -1)
    tl.debug_barrier()  # before anything is overwritten
    at_low = found
    above = wanted * 0
    while (at_low > wanted) & (high - low > 1):
        middle = low + (high - low) // 2
        reach = tl.sum((b_key >= middle).to(tl.int32), 0)
        low, high, at_low, above = halve(low, high, at_low, above, middle, reach, wanted)
    b_wins, b_slot = ranked(b_key, low, tl.where(at_low > wanted, wanted - above, CAPACITY), 0)
    tl.store(p_list + b_slot, b_position, mask=b_wins)


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
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Moves acc of a chunk, of which `left` elements exist, to err; writes the positions of the largest.
    Returns how many those are, and whether anything is not finite."""
    wanted = tl.minimum(left, K)
    if left == 2**LEVELS:
        low, most, found = _list_chunk(
            p_grad, p_err, p_list, left, wanted, K, LEVELS, GROUPS, CAPACITY, TILE, True
        )
    else:
        # Masks cost registers, which smaller tiles give back.
        low, most, found = _list_chunk(
            p_grad, p_err, p_list, left, wanted, K, LEVELS, min(GROUPS, STEP), CAPACITY, STEP, False
        )
    tl.debug_barrier()
    if (CAPACITY > 0) & (found <= CAPACITY):
        _rank_list(p_err, p_list, found, low, most + 1, wanted, CAPACITY)
    else:
        _rank_chunk(p_err, p_list, left, low, most + 1, wanted, STEP)
    return wanted, most >= INFINITY
