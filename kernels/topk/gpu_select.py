"""Refining the threshold digit by digit, and writing out the winners in order.

A run is what one program counts and emits: some consecutive tiles, seen as ROWS rows that it reads side by
side, because reading them in turn would wait for memory once a row. In LIST mode a row is what the list
holds of a tile, else an equal share of the run's elements of err.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, canonical, is_finite, magnitude_key, round_to, widen
from gck.kernels.common.tiles import load_tile, tile_offsets
from gck.kernels.topk.gpu_control import HISTOGRAMS
from gck.kernels.topk.gpu_stream import listed_rows

ROWS = 8  # divides a tile; the most tiles of a run
BLOCK = 64  # elements of a row at a time
GROUP = 64  # runs whose counts are also kept as one sum
RUN_WARPS = 8
REFINE_WARPS = 8
GROUPS_BLOCK = tl.constexpr(512)  # such sums that a program adds at a time


@triton.jit
def _digit_counts(
    p_source,
    i_tile,
    length,
    prefix,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_offset = tile_offsets(i_tile, TILE)
    b_key = magnitude_key(canonical(load_tile(p_source, b_offset, length, WHOLE)))
    b_match = (b_key >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS))
    if not WHOLE:
        b_match &= b_offset < length
    return tl.histogram((b_key >> SHIFT) & ((1 << BITS) - 1), BINS, mask=b_match)


@triton.jit
def refine_part(
    p_source,
    p_control,
    length,
    part,
    parts,
    prefix,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts a digit, the BITS bits from SHIFT on, of the keys that begin with the prefix, in every
    parts-th tile of the source."""
    b_count = tl.zeros((BINS,), tl.int32)
    whole = tl.cast(length, tl.int64) // TILE
    for i_tile in range(tl.cast(part, tl.int64), whole, tl.cast(parts, tl.int64)):
        b_count += _digit_counts(p_source, i_tile, length, prefix, SHIFT, BITS, TILE, BINS, True)
    if (whole % parts == part) & (whole * TILE < length):
        b_count += _digit_counts(p_source, whole, length, prefix, SHIFT, BITS, TILE, BINS, False)
    p_histogram = p_control + HISTOGRAMS + DIGIT * BINS + tl.arange(0, BINS)
    tl.atomic_add(p_histogram, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def _classify(b_acc, b_valid, threshold):
    """1 for each element above the threshold, 65536 for each tie, else 0: one sum counts both."""
    b_key = magnitude_key(b_acc)
    b_class = tl.where(b_key > threshold, 1, tl.where(b_key == threshold, 65536, 0))
    return tl.where(b_valid, b_class, 0)


@triton.jit
def _rows_of_run(
    p_tile, first_tile, stop_tile, run_tiles, n, in_list, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """(place in the source, length, place in the run) of each row of a run."""
    b_row = tl.arange(0, ROWS)
    if in_list:
        b_base, b_length = listed_rows(p_tile, first_tile, stop_tile - first_tile, ROWS)
        b_first = b_row * TILE
    else:
        start = tl.cast(first_tile, tl.int64) * TILE
        span = run_tiles * (TILE // ROWS)
        b_first = b_row * span
        b_base = start + b_first
        b_length = tl.minimum(tl.maximum(n - b_base, 0), span).to(tl.int32)
    return b_base, b_length, b_first


@triton.jit
def count_run(
    p_list,
    p_err,
    p_tile,
    p_rows,
    p_runs,
    p_groups,
    i_run,
    first_tile,
    stop_tile,
    run_tiles,
    n,
    in_list,
    threshold,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Counts what lies above the threshold and what ties with it, by row, by run and by group of runs."""
    b_base, b_length, _ = _rows_of_run(p_tile, first_tile, stop_tile, run_tiles, n, in_list, TILE, ROWS)
    p_source = p_err
    if in_list:
        p_source = p_list
    b_class = tl.zeros((ROWS, BLOCK), tl.int32)
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_acc = tl.load((p_source + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0)
        b_class += _classify(canonical(b_acc), b_valid, threshold)
    b_both = tl.sum(b_class, 1)
    tl.store(p_rows + i_run * ROWS + tl.arange(0, ROWS), b_both)
    above = tl.sum(b_both & 0xFFFF, 0).to(tl.int64)
    ties = tl.sum(b_both >> 16, 0).to(tl.int64)
    tl.store(p_runs + 2 * i_run, above)
    tl.store(p_runs + 2 * i_run + 1, ties)
    p_group = p_groups + 2 * (i_run // GROUP)
    if above > 0:
        tl.atomic_add(p_group, above, sem="relaxed")
    if ties > 0:
        tl.atomic_add(p_group + 1, ties, sem="relaxed")


@triton.jit
def _counted_before(p_runs, p_groups, i_run, GROUP: tl.constexpr):
    """(above the threshold, ties) in all runs before this one."""
    group = i_run // GROUP
    b_run = tl.arange(0, GROUP)
    p_run = p_runs + 2 * (group * GROUP + b_run)
    b_earlier = b_run < i_run - group * GROUP
    above = tl.sum(tl.load(p_run, mask=b_earlier, other=0), 0)
    ties = tl.sum(tl.load(p_run + 1, mask=b_earlier, other=0), 0)
    for first in range(0, group, GROUPS_BLOCK):
        b_group = first + tl.arange(0, GROUPS_BLOCK)
        above += tl.sum(tl.load(p_groups + 2 * b_group, mask=b_group < group, other=0), 0)
        ties += tl.sum(tl.load(p_groups + 2 * b_group + 1, mask=b_group < group, other=0), 0)
    return above, ties


@triton.jit
def _scatter(b_pointer, b_value, b_mask):
    """A store to scattered addresses, which as a block of one dimension stays where the rows were read."""
    SIZE: tl.constexpr = b_value.shape[0] * b_value.shape[1]
    tl.store(tl.reshape(b_pointer, (SIZE,)), tl.reshape(b_value, (SIZE,)), mask=tl.reshape(b_mask, (SIZE,)))


@triton.jit
def emit_run(
    p_list,
    p_locals,
    p_err,
    p_tile,
    p_rows,
    p_runs,
    p_groups,
    p_values,
    p_indices,
    p_nonfinite,
    i_run,
    first_tile,
    stop_tile,
    run_tiles,
    n,
    origin,
    in_list,
    threshold,
    quota,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the winners of a run in order, their indices counted from `origin`, and to err what they
    and the losers leave there. The first `quota` ties of all runs win."""
    above, ties = _counted_before(p_runs, p_groups, i_run, GROUP)
    b_base, b_length, b_first = _rows_of_run(p_tile, first_tile, stop_tile, run_tiles, n, in_list, TILE, ROWS)
    b_both = tl.load(p_rows + i_run * ROWS + tl.arange(0, ROWS))
    b_above = b_both & 0xFFFF
    b_ties = b_both >> 16
    b_ties_before = ties + tl.cumsum(b_ties, 0) - b_ties
    b_position = above + tl.cumsum(b_above, 0) - b_above + tl.minimum(b_ties_before, quota)
    b_quota = tl.minimum(tl.maximum(quota - b_ties_before, 0), 0xFFFF).to(tl.int32)
    # err is read again only where a row has winners, or may have infinities that lose and must not stay.
    if (in_list == 0) & (threshold < INFINITY):
        b_length = tl.where(b_above + tl.minimum(b_ties, b_quota) > 0, b_length, 0)
    start = tl.cast(first_tile, tl.int64) * TILE
    p_source = p_err
    if in_list:
        p_source = p_list
    cleared = tl.cast(0, tl.int32)
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_acc = canonical(tl.load((p_source + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0))
        b_local = tl.zeros_like(b_valid).to(tl.int32) + b_entry[None, :]
        if in_list:
            b_local = tl.load((p_locals + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0).to(
                tl.int32
            )
        b_local += b_first[:, None]
        b_class = _classify(b_acc, b_valid, threshold)
        b_rank = tl.cumsum(b_class, 1)  # one scan ranks both classes
        b_tie_rank = b_rank >> 16
        b_wins = (b_class == 1) | ((b_class > 1) & (b_tie_rank <= b_quota[:, None]))
        b_slot = (b_rank & 0xFFFF) + tl.minimum(b_tie_rank, b_quota[:, None]) - 1
        b_value = round_to(b_acc, p_values.dtype.element_ty)
        _scatter((p_values + b_position)[:, None] + b_slot, b_value, b_wins)
        b_index = (origin + start).to(p_indices.dtype.element_ty) + b_local
        _scatter((p_indices + b_position)[:, None] + b_slot, b_index, b_wins)
        b_residual = tl.where(b_wins, b_acc - widen(b_value), b_acc)
        b_cleared = b_valid & (is_finite(b_residual) == 0)
        b_residual = tl.where(b_cleared, 0.0, b_residual)
        # The stream left +0.0 where it listed; a loser that was not listed is in its place.
        b_moved = tl.where(in_list, b_residual.to(tl.int32, bitcast=True) != 0, b_wins | b_cleared)
        _scatter(p_err + start + b_local, b_residual, b_valid & b_moved)
        cleared += tl.sum(tl.sum(b_cleared.to(tl.int32), 1), 0)
        b_both = tl.sum(b_class, 1)
        b_won = tl.minimum(b_both >> 16, b_quota)
        b_position += (b_both & 0xFFFF) + b_won
        b_quota -= b_won
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")
