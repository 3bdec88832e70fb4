"""The exact threshold, and how many winners each row has, in one kernel.

The k-th key lies in an interval of keys: the bracket, or all keys. A level of the search counts the
interval's keys in bins, all programs together, and the bin of the k-th is the next level's interval. Once it
has few keys, one pass counts what lies above them by row, and sets them apart, each with its row: the last
program to arrive picks the threshold from them and counts the winners among them. After most guesses that
takes one level and one pass over the list; where the list was no help, it is first put back into err, which
is searched instead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import canonical, magnitude_key
from gck.kernels.common.tiles import load_tile, tile_offsets
from gck.kernels.topk.gpu_control import (
    HISTOGRAMS,
    LEVELS,
    NEAR,
    PASSED,
    QUOTA,
    THRESHOLD,
)
from gck.kernels.topk.gpu_select import shares_of_run, store_counts
from gck.kernels.topk.gpu_stream import listed_rows, restore_run

NEAR_ROOM = 8192  # keys that are set apart at most, which one program looks through
LEVEL_TILE = 1024  # keys that a program counts at a time: a short list is enough for all programs
SEARCH = tl.constexpr(512)  # elements at a time where speed matters less than registers
LAST_KEY = tl.constexpr(0x7FFFFFFF)  # past any key
ALL_BITS = tl.constexpr(31)  # tell all keys apart
BIN_BITS = tl.constexpr(8)  # of them, those that a level's bins do
# Steps of the kernel, for where programs run one after another: a launch each, the levels in between.
TOGETHER, RESTORE, COUNT = tl.constexpr(-1), tl.constexpr(0), tl.constexpr(LEVELS + 1)


@triton.jit
def wait_for_all(p_control, times):
    """Returns when every program of the grid has come here for the `times`-th time.

    All of them must be on the device together: see `common.launch.most_together`.
    """
    tl.debug_barrier()
    wanted = times * tl.num_programs(0)
    passed = tl.atomic_add(p_control + PASSED, 1, sem="acq_rel") + 1
    while passed < wanted:
        passed = tl.atomic_add(p_control + PASSED, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def restore_runs(
    p_err, p_list, p_locals, p_tile, tiles, runs, run_tiles, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """Puts the list back into err, this program's share of the runs."""
    for i_run in range(tl.program_id(0), runs, tl.num_programs(0)):
        first = i_run * run_tiles
        count = tl.minimum(tiles - first, run_tiles)
        restore_run(p_err, p_list, p_locals, p_tile, first, count, TILE, ROWS, SEARCH // ROWS)


@triton.jit
def _counts_of_tile(
    p_source,
    i_tile,
    length,
    first_key,
    stop_key,
    shift,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_offset = tile_offsets(i_tile, TILE)
    b_key = magnitude_key(canonical(load_tile(p_source, b_offset, length, WHOLE)))
    b_bin = (b_key - first_key) >> shift
    b_inside = (b_key >= first_key) & (b_key < stop_key) & (b_bin < BINS)
    if not WHOLE:
        b_inside &= b_offset < length
    return tl.histogram(b_bin & (BINS - 1), BINS, mask=b_inside)


@triton.jit
def count_level(
    p_source,
    p_control,
    level,
    length,
    first_key,
    stop_key,
    bits,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts the keys of the interval that has first_key, so many bits, and no key from stop_key on."""
    shift = tl.maximum(bits - BIN_BITS, 0)
    b_count = tl.zeros((BINS,), tl.int32)
    whole = tl.cast(length, tl.int64) // TILE
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0).to(tl.int64)
    for i_tile in range(part, whole, parts):
        b_count += _counts_of_tile(p_source, i_tile, length, first_key, stop_key, shift, TILE, BINS, True)
    if (whole % parts == part) & (whole * TILE < length):
        b_count += _counts_of_tile(p_source, whole, length, first_key, stop_key, shift, TILE, BINS, False)
    p_histogram = p_control + HISTOGRAMS + level * BINS + tl.arange(0, BINS)
    tl.atomic_add(p_histogram, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def narrow(p_control, level, total, wanted, first_key, stop_key, bits, BINS: tl.constexpr):
    """The next interval, from what a level counted of `total` keys, the `wanted`-th of which is looked for.

    Returns (its keys, which of them is looked for, first_key, stop_key, bits). Each program finds it by
    itself, from the L2 cache, where all of them counted.
    """
    b_bin = tl.arange(0, BINS)
    b_count = tl.load(p_control + HISTOGRAMS + level * BINS + b_bin, cache_modifier=".cg")
    above = total - tl.sum(b_count, 0)
    b_at_least = above + tl.cumsum(b_count, 0, reverse=True)
    bin = tl.sum((b_at_least >= wanted).to(tl.int32), 0) - 1
    shift = tl.maximum(bits - BIN_BITS, 0)
    # The bracket may end too low.
    missed = above >= wanted
    count = tl.where(missed, above, tl.sum(tl.where(b_bin == bin, b_count, 0), 0))
    wanted -= tl.where(missed, 0, tl.sum(tl.where(b_bin == bin, b_at_least - b_count, 0), 0))
    next_key = tl.where(missed, stop_key, first_key + (bin << shift))
    stop_key = tl.where(missed, LAST_KEY, stop_key)
    return count, wanted, next_key, stop_key, tl.where(missed, ALL_BITS, shift)


@triton.jit
def count_rows(
    p_list,
    p_err,
    p_tile,
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    apart,
    tiles,
    runs,
    run_tiles,
    n,
    LISTED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Counts the keys from stop_key on, by row and by group of rows, of this program's share of the runs.
    Keys from first_key on that are below it are set apart with their rows, or else are counted as ties."""
    p_taken = (p_control + NEAR).to(tl.pointer_type(tl.int32)) + tl.zeros((ROWS, BLOCK), tl.int32)
    tie = tl.where(apart, 0, 65536)
    apart_key = tl.where(apart, first_key, LAST_KEY)
    for i_run in range(tl.program_id(0), runs, tl.num_programs(0)):
        # Not asked for a run ahead: of a block that a loop carries, Triton 3.6 reduces what it was at first.
        first = i_run * run_tiles
        if LISTED:
            p_source = p_list
            b_base, b_length = listed_rows(p_tile, first, tl.minimum(tiles - first, run_tiles), ROWS)
        else:
            p_source = p_err + tl.cast(first, tl.int64) * TILE
            b_base, b_length = shares_of_run(first, run_tiles, n, TILE, ROWS)
        b_row = i_run * ROWS + tl.arange(0, ROWS)
        b_both = tl.zeros((ROWS,), tl.int32)
        longest = tl.max(b_length, 0)
        for done in range(0, longest, BLOCK):
            b_entry = done + tl.arange(0, BLOCK)
            b_valid = b_entry[None, :] < b_length[:, None]
            b_acc = tl.load((p_source + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0)
            b_key = magnitude_key(canonical(b_acc))
            b_near = b_valid & (b_key >= first_key) & (b_key < stop_key)
            b_class = tl.where(b_valid & (b_key >= stop_key), 1, tl.where(b_near, tie, 0))
            b_both += tl.sum(b_class, 1)
            b_apart = b_near & (b_key >= apart_key)
            b_slot = tl.atomic_add(p_taken, tl.full(b_key.shape, 1, tl.int32), mask=b_apart, sem="relaxed")
            tl.store(p_near + b_slot, b_key, mask=b_apart)
            tl.store(p_near + ROOM + b_slot, tl.zeros_like(b_key) + b_row[:, None], mask=b_apart)
        store_counts(p_rows, p_groups, i_run, b_both, ROWS, GROUP)


@triton.jit
def _add_winners(
    p_rows,
    p_groups,
    p_near,
    first,
    count,
    threshold,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
):
    b_slot = first + tl.arange(0, PART)
    b_inside = b_slot < count
    b_key = tl.load(p_near + b_slot, mask=b_inside, other=-1, cache_modifier=".cg")
    b_row = tl.load(p_near + SIZE + b_slot, mask=b_inside, other=0, cache_modifier=".cg")
    b_wins = b_key >= threshold
    b_tie = (b_key == threshold).to(tl.int32)
    tl.atomic_add(p_rows + b_row, tl.where(b_tie > 0, 65536, 1), mask=b_wins, sem="relaxed")
    b_one = tl.full((PART,), 1, tl.int64)
    tl.atomic_add(p_groups + 2 * (b_row // GROUP) + b_tie, b_one, mask=b_wins, sem="relaxed")


@triton.jit
def _threshold(p_near, first_key, stop_key, count, wanted, SIZE: tl.constexpr):
    """(the `wanted`-th of the `count` keys set apart, how many lie above it)"""
    b_slot = tl.arange(0, SIZE)
    b_inside = b_slot < count
    b_key = tl.load(p_near + b_slot, mask=b_inside, other=-1, cache_modifier=".cg")
    low, high, reach = first_key, stop_key, count.to(tl.int32)
    while (high - low > 1) & (reach > wanted):
        middle = low + (high - low) // 2
        there = tl.sum(tl.where(b_key >= middle, 1, 0), 0)
        up = there >= wanted
        low = tl.where(up, middle, low)
        reach = tl.where(up, there, reach)
        high = tl.where(up, high, middle)
    # Exactly as many as are wanted may have been found before the interval closed.
    threshold = tl.min(tl.where(b_key >= low, b_key, LAST_KEY), 0)
    return threshold, tl.sum((b_key > threshold).to(tl.int32), 0)


@triton.jit
def pick_threshold(
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    count,
    wanted,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Picks the `wanted`-th of the keys set apart, and adds those that win, and tie, to the counts."""
    PART: tl.constexpr = SIZE // 4
    if count <= PART:  # a search through few takes half the time
        threshold, above = _threshold(p_near, first_key, stop_key, count, wanted, PART)
    else:
        threshold, above = _threshold(p_near, first_key, stop_key, count, wanted, SIZE)
    tl.store(p_control + THRESHOLD, threshold.to(tl.int64))
    tl.store(p_control + QUOTA, wanted - above)
    for first in range(0, count.to(tl.int32), PART):  # anew, because all of them take all registers
        _add_winners(p_rows, p_groups, p_near, first, count, threshold, GROUP, SIZE, PART)
