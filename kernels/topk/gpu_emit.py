"""Writing out the winners of a run in order, and what they and the losers leave behind.

See `gpu_select` for runs, rows and their counts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, canonical, is_finite, round_to, widen
from gck.kernels.topk.gpu_select import classify
from gck.kernels.topk.gpu_stream import left_by_stream, listed_rows, listed_tile

EMIT_WARPS = 1  # a row is ranked without waiting for another warp
EMIT_REGISTERS = 128
EMIT_WIDE = tl.constexpr(256)  # entries at a time of a row that is emitted by itself


@triton.jit
def _before(p_rows, p_groups, first_row, quota, GROUP: tl.constexpr):
    """(winners of all rows before this one, how many ties may still win)"""
    group = first_row // GROUP
    b_row = tl.arange(0, GROUP)
    b_earlier = b_row < first_row - group * GROUP
    b_both = tl.load(p_rows + group * GROUP + b_row, mask=b_earlier, other=0)
    above = tl.sum(b_both & 0xFFFF, 0).to(tl.int64)
    ties = tl.sum(b_both >> 16, 0).to(tl.int64)
    for first in range(0, group, GROUP):
        b_group = first + tl.arange(0, GROUP)
        above += tl.sum(tl.load(p_groups + 2 * b_group, mask=b_group < group, other=0), 0)
        ties += tl.sum(tl.load(p_groups + 2 * b_group + 1, mask=b_group < group, other=0), 0)
    left = tl.minimum(tl.maximum(quota - ties, 0), 1 << 30).to(tl.int32)
    return above + tl.minimum(ties, quota), left


@triton.jit
def _places(p_rows, p_groups, i_run, quota, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(where a run's first winner goes; for each of its rows, where its first goes after that, and how many
    of its ties win)

    What is told apart within a run has 32 bits: addresses take the most registers.
    """
    first_row = i_run * ROWS
    at, left = _before(p_rows, p_groups, first_row, quota, GROUP)
    b_both = tl.load(p_rows + first_row + tl.arange(0, ROWS))
    b_above = b_both & 0xFFFF
    b_ties = b_both >> 16
    b_ties_before = tl.cumsum(b_ties, 0) - b_ties
    b_position = tl.cumsum(b_above, 0) - b_above + tl.minimum(b_ties_before, left)
    b_quota = tl.minimum(tl.maximum(left - b_ties_before, 0), 0xFFFF)
    return at, b_position, b_quota


@triton.jit
def _after(b_both, b_position, b_quota):
    """The positions and quotas once entries of these classes are written."""
    b_won = tl.minimum(b_both >> 16, b_quota)
    return b_position + (b_both & 0xFFFF) + b_won, b_quota - b_won


@triton.jit
def _scatter(b_pointer, b_value, b_mask):
    """A store to scattered addresses, which as a block of one dimension stays where the rows were read."""
    SIZE: tl.constexpr = b_value.numel
    tl.store(tl.reshape(b_pointer, (SIZE,)), tl.reshape(b_value, (SIZE,)), mask=tl.reshape(b_mask, (SIZE,)))


@triton.jit
def _put(
    p_values,
    p_indices,
    p_err,
    b_acc,
    b_valid,
    b_class,
    b_rank,
    b_position,
    b_quota,
    b_place,
    first_index,
    expected,
    LISTED: tl.constexpr,
):
    """Writes the winners of a block, and to err what is not there yet; returns how many entries it cleared.
    b_rank ranks both classes, each in its half."""
    b_tie_rank = b_rank >> 16
    b_wins = (b_class == 1) | ((b_class > 1) & (b_tie_rank <= b_quota))
    b_slot = b_position + (b_rank & 0xFFFF) + tl.minimum(b_tie_rank, b_quota) - 1
    b_value = round_to(b_acc, p_values.dtype.element_ty)
    _scatter(p_values + b_slot, b_value, b_wins)
    _scatter(p_indices + b_slot, first_index.to(p_indices.dtype.element_ty) + b_place, b_wins)
    b_residual = tl.where(b_wins, b_acc - widen(b_value), b_acc)
    b_cleared = b_valid & (is_finite(b_residual) == 0)
    b_residual = tl.where(b_cleared, 0.0, b_residual)
    if LISTED:
        b_left = left_by_stream(b_acc, expected)
        b_differs = b_valid & (b_residual.to(tl.int32, bitcast=True) != b_left.to(tl.int32, bitcast=True))
    else:
        b_differs = b_wins | b_cleared
    _scatter(p_err + b_place, b_residual, b_differs)
    return tl.sum(tl.reshape(b_cleared.to(tl.int32), (b_acc.numel,)), 0)


@triton.jit
def emit_listed(
    p_list,
    p_locals,
    p_err,
    p_tile,
    p_rows,
    p_groups,
    p_values,
    p_indices,
    p_nonfinite,
    i_run,
    first_tile,
    stop_tile,
    origin,
    threshold,
    quota,
    expected,
    long,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BRACKET: tl.constexpr,
):
    """Writes the winners of a run, all of them in the list, in order, their indices counted from `origin`,
    and to err what they and the losers leave there. The first `quota` ties of all runs win. Rows of more than
    `long` entries are left out."""
    # Asked for first: what the loop reads waits for it, and not for the places.
    b_base, b_length, _base, _length = listed_rows(p_tile, first_tile, stop_tile - first_tile, ROWS, BRACKET)
    b_length = tl.where(b_length > long, 0, b_length)
    at, b_position, b_quota = _places(p_rows, p_groups, i_run, quota, ROWS, GROUP)
    start = tl.cast(first_tile, tl.int64) * TILE
    p_values += at
    p_indices += at
    p_err += start
    b_first = tl.arange(0, ROWS) * TILE
    cleared = tl.cast(0, tl.int32)
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_acc = canonical(tl.load((p_list + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0))
        b_local = tl.load((p_locals + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0)
        b_class = classify(b_acc, b_valid, threshold)
        cleared += _put(
            *(p_values, p_indices, p_err, b_acc, b_valid, b_class, tl.cumsum(b_class, 1)),
            *(b_position[:, None], b_quota[:, None], b_local.to(tl.int32) + b_first[:, None]),
            *(origin + start, expected, True),
        )
        b_position, b_quota = _after(tl.sum(b_class, 1), b_position, b_quota)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")


@triton.jit
def _emit_row(
    p_source,
    p_locals,
    p_err,
    p_values,
    p_indices,
    p_nonfinite,
    length,
    at,
    quota,
    first_index,
    threshold,
    expected,
    LISTED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes the winners of a row of so many entries from `at` on; the first `quota` ties of it win."""
    p_values += at
    p_indices += at
    position = tl.cast(0, tl.int32)
    cleared = tl.cast(0, tl.int32)
    for done in range(0, length, WIDE):
        b_entry = done + tl.arange(0, WIDE)
        b_valid = b_entry < length
        b_acc = canonical(tl.load(p_source + b_entry, mask=b_valid, other=0.0))
        b_place = b_entry
        if LISTED:
            b_place = tl.load(p_locals + b_entry, mask=b_valid, other=0).to(tl.int32)
        b_class = classify(b_acc, b_valid, threshold)
        cleared += _put(
            *(p_values, p_indices, p_err, b_acc, b_valid, b_class, tl.cumsum(b_class, 0), position, quota),
            *(b_place, first_index, expected, LISTED),
        )
        position, quota = _after(tl.sum(b_class, 0), position, quota)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")


@triton.jit
def emit_long_tiles(
    p_list,
    p_locals,
    p_err,
    p_tile,
    p_long,
    p_rows,
    p_groups,
    p_values,
    p_indices,
    p_nonfinite,
    long_tiles,
    threshold,
    quota,
    expected,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BRACKET: tl.constexpr,
):
    """What `emit_listed` leaves out, this program's share of it."""
    for i_long in range(tl.program_id(0), long_tiles, tl.num_programs(0)):
        i_tile = tl.load(p_long + i_long)
        base, length, _base, _length = listed_tile(p_tile, i_tile, BRACKET)
        at, left = _before(p_rows, p_groups, i_tile.to(tl.int32), quota, GROUP)
        _emit_row(
            *(p_list + base, p_locals + base, p_err + i_tile * TILE, p_values, p_indices, p_nonfinite),
            *(length, at, left, i_tile * TILE, threshold, expected, True, EMIT_WIDE),
        )


@triton.jit
def emit_scanned(
    p_err,
    p_rows,
    p_groups,
    p_values,
    p_indices,
    p_nonfinite,
    i_run,
    first_tile,
    run_tiles,
    n,
    origin,
    threshold,
    quota,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What `emit_listed` does for a run whose winners are all in err."""
    at, left = _before(p_rows, p_groups, i_run * ROWS, quota, GROUP)
    span = run_tiles * (TILE // ROWS)
    for row in range(ROWS):
        start = tl.cast(first_tile, tl.int64) * TILE + row * span
        length = tl.minimum(tl.maximum(n - start, 0), span).to(tl.int32)
        if length > 0:
            both = tl.load(p_rows + i_run * ROWS + row)
            won = tl.minimum(both >> 16, left)
            winners = (both & 0xFFFF) + won
            # err is read again only where a row has winners, or may have infinities that lose and must not
            # stay.
            if (winners > 0) | (threshold >= INFINITY):
                _emit_row(
                    *(p_err + start, p_err, p_err + start, p_values, p_indices, p_nonfinite),
                    *(length, at, left, origin + start, threshold, 0.0, False, WIDE),
                )
            at += winners
            left -= won
