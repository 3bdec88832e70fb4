"""The exact threshold, and how many winners each run of tiles holds, in one kernel.

`near_runs` is the common way. The stream counted the keys of the bracket in bins, so that the bin of the k-th
key is known: one pass over the list counts what lies above that bin, and sets apart the few keys in it, of
which the last program to arrive picks the threshold and counts the winners among them.

`search_phase` is for every other case: digit by digit through the list or err, most significant first, with
a barrier of all programs after each phase.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, canonical, magnitude_key
from gck.kernels.topk.gpu_control import (
    ARRIVED,
    BRACKET_SHIFT,
    BRACKET_STOP,
    DIGITS,
    GUESS,
    KNOWN,
    LIST,
    LISTED,
    NEAR,
    PASSED,
    QUOTA,
    THRESHOLD,
    decide,
    last_decision,
    note,
)
from gck.kernels.topk.gpu_select import count_run, refine_part
from gck.kernels.topk.gpu_stream import listed_rows, restore_run

NEAR_ROOM = 4096  # keys that are set apart at most, which one program looks through
SEARCH = tl.constexpr(512)  # elements at a time where speed matters less than registers
RESTORE = tl.constexpr(0)  # phases
COUNT = tl.constexpr(1 + len(DIGITS))
PHASES = COUNT.value + 1


@triton.jit
def near_bin(p_control, p_bins, k, BINS: tl.constexpr, ROOM: tl.constexpr):
    """(whether the k-th key is in a bin of few keys; that bin's first key, the first one after it, keys in
    it, and how many of them win)"""
    b_bin = tl.arange(0, BINS)
    b_count = tl.load(p_bins + b_bin)
    listed = tl.load(p_control + LISTED)
    b_at_least = listed - tl.sum(b_count, 0) + tl.cumsum(b_count, 0, reverse=True)
    bin = tl.sum((b_at_least >= k).to(tl.int32), 0) - 1
    count = tl.sum(tl.where(b_bin == bin, b_count, 0), 0)
    above = tl.sum(tl.where(b_bin == bin, b_at_least - b_count, 0), 0)
    shift = tl.load(p_control + BRACKET_SHIFT).to(tl.int32)
    first = tl.load(p_control + GUESS) + (bin.to(tl.int64) << shift)
    width = tl.cast(1, tl.int64) << shift
    stop = tl.minimum(first + width, tl.load(p_control + BRACKET_STOP)).to(tl.int32)
    found = (bin >= 0) & (count <= ROOM) & (above < k) & (above + count >= k)
    return found, first.to(tl.int32), stop, count, (k - above).to(tl.int32)


@triton.jit
def near_runs(
    p_list,
    p_tile,
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    tiles,
    runs,
    run_tiles,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Counts the list's keys from stop_key on, by row and by group of rows, and sets apart those from
    first_key on that are below, each with its row. Of this program's share of the runs."""
    p_taken = (p_control + NEAR).to(tl.pointer_type(tl.int32)) + tl.zeros((ROWS, BLOCK), tl.int32)
    for i_run in range(tl.program_id(0), runs, tl.num_programs(0)):
        # Not asked for a run ahead: of a block that a loop carries, Triton 3.6 reduces what it was at first.
        first = i_run * run_tiles
        b_base, b_length = listed_rows(p_tile, first, tl.minimum(tiles - first, run_tiles), ROWS)
        b_row = i_run * ROWS + tl.arange(0, ROWS)
        b_above = tl.zeros((ROWS, BLOCK), tl.int32)
        longest = tl.max(b_length, 0)
        for done in range(0, longest, BLOCK):
            b_entry = done + tl.arange(0, BLOCK)
            b_valid = b_entry[None, :] < b_length[:, None]
            b_acc = tl.load((p_list + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0)
            b_key = magnitude_key(canonical(b_acc))
            b_above += (b_valid & (b_key >= stop_key)).to(tl.int32)
            b_near = b_valid & (b_key >= first_key) & (b_key < stop_key)
            b_slot = tl.atomic_add(p_taken, tl.full(b_key.shape, 1, tl.int32), mask=b_near, sem="relaxed")
            tl.store(p_near + b_slot, b_key, mask=b_near)
            tl.store(p_near + ROOM + b_slot, tl.zeros_like(b_key) + b_row[:, None], mask=b_near)
        b_count = tl.sum(b_above, 1)
        tl.store(p_rows + b_row, b_count)
        above = tl.sum(b_count, 0).to(tl.int64)
        if above > 0:
            tl.atomic_add(p_groups + 2 * (i_run * ROWS // GROUP), above, sem="relaxed")


@triton.jit
def arrive(p_control):
    """Whether this program is the last one to come here. What the others wrote before is there then."""
    tl.debug_barrier()
    arrived = tl.atomic_add(p_control + ARRIVED, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == tl.num_programs(0) - 1


@triton.jit
def near_threshold(
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
    b_slot = tl.arange(0, SIZE)
    b_inside = b_slot < count
    b_key = tl.load(p_near + b_slot, mask=b_inside, other=-1, cache_modifier=".cg")
    b_row = tl.load(p_near + SIZE + b_slot, mask=b_inside, other=0, cache_modifier=".cg")
    low, high, reach = first_key, stop_key, count
    while (high - low > 1) & (reach > wanted):
        middle = low + (high - low) // 2
        there = tl.sum(tl.where(b_key >= middle, 1.0, 0.0), 0).to(tl.int32)
        up = there >= wanted
        low = tl.where(up, middle, low)
        reach = tl.where(up, there, reach)
        high = tl.where(up, high, middle)
    # Exactly as many as are wanted may have been found before the interval closed.
    threshold = tl.min(tl.where(b_key >= low, b_key, INFINITY), 0)
    above = tl.sum((b_key > threshold).to(tl.int32), 0)
    tl.store(p_control + THRESHOLD, threshold.to(tl.int64))
    tl.store(p_control + QUOTA, (wanted - above).to(tl.int64))
    b_wins = b_key >= threshold
    b_tie = (b_key == threshold).to(tl.int32)
    b_one = tl.full((SIZE,), 1, tl.int64)
    tl.atomic_add(p_rows + b_row, tl.where(b_tie > 0, 65536, 1), mask=b_wins, sem="relaxed")
    tl.atomic_add(p_groups + 2 * (b_row // GROUP) + b_tie, b_one, mask=b_wins, sem="relaxed")


@triton.jit
def wait_for_all(p_control, times):
    """Returns when every program of the grid has come here for the `times`-th time.

    All of them must be on the device together: the grid has no more programs than processors, and a program
    takes less than a processor has.
    """
    tl.debug_barrier()
    wanted = times * tl.num_programs(0)
    passed = tl.atomic_add(p_control + PASSED, 1, sem="acq_rel") + 1
    while passed < wanted:
        passed = tl.atomic_add(p_control + PASSED, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _digit(digit):
    """DIGITS[digit], on the device: (lowest bit, bits)."""
    shift = tl.maximum(23 - 8 * digit, 0)
    return shift, 31 - 8 * digit - shift


@triton.jit
def search_phase(
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_rows,
    p_groups,
    p_control,
    phase,
    mode,
    n,
    k,
    tiles,
    runs,
    run_tiles,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BINS: tl.constexpr,
    LISTING: tl.constexpr,
):
    """A phase of the search: RESTORE the list to err if it is no help, then a digit each, then COUNT."""
    i_program = tl.program_id(0)
    programs = tl.num_programs(0)
    if phase == RESTORE:
        if LISTING and mode != LIST:
            for i_run in range(i_program, runs, programs):
                first = i_run * run_tiles
                count = tl.minimum(tiles - first, run_tiles)
                restore_run(p_err, p_list, p_locals, p_tile, first, count, TILE, ROWS, SEARCH // ROWS)
    elif phase < COUNT:
        if mode != KNOWN:
            digit = phase - 1
            shift, bits = _digit(digit)
            prefix = tl.cast(0, tl.int32)
            if digit > 0:
                prefix, wanted = decide(p_control, k, digit - 1, _digit(digit - 1)[0], BINS)
                if i_program == 0:
                    note(p_control, prefix, wanted, digit - 1)
            p_source = p_err
            length = tl.cast(n, tl.int64)
            if mode == LIST:
                p_source = p_list
                length = tl.load(p_control + LISTED)
            refine_part(
                *(p_source, p_control, length, i_program, programs, prefix, digit, shift, bits, TILE, BINS)
            )
    else:
        threshold, quota = last_decision(p_control, k, mode, COUNT - 2, 0, BINS)
        if i_program == 0:
            note(p_control, threshold, quota, COUNT - 2)
        for i_run in range(i_program, runs, programs):
            first = i_run * run_tiles
            stop = tl.minimum(first + run_tiles, tiles)
            count_run(
                *(p_list, p_err, p_tile, p_rows, p_groups, i_run, first, stop, run_tiles, n),
                *(mode == LIST, threshold, TILE, ROWS, SEARCH // ROWS, GROUP),
            )
