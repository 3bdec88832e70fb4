"""Writing out the winners of a run in order, and what they and the losers leave behind.

See `gpu_select` for runs, rows and their counts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, canonical, is_finite, round_to, widen
from gck.kernels.topk.gpu_select import classify, shares_of_run
from gck.kernels.topk.gpu_stream import left_by_stream, listed_rows

EMIT_WARPS = 1  # a row is ranked without waiting for another warp
EMIT_REGISTERS = 128
EMIT_SEARCH = tl.constexpr(128)  # entries at a time of a run whose winners are in err


@triton.jit
def _places(p_rows, p_groups, i_run, quota, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(where a run's first winner goes; for each of its rows, where its first goes after that, how many of
    its ties win, and its winners)

    What is told apart within a run has 32 bits: addresses take the most registers.
    """
    first_row = i_run * ROWS
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
    at = above + tl.minimum(ties, quota)
    left = tl.minimum(tl.maximum(quota - ties, 0), 1 << 30).to(tl.int32)
    b_both = tl.load(p_rows + first_row + tl.arange(0, ROWS))
    b_above = b_both & 0xFFFF
    b_ties = b_both >> 16
    b_ties_before = tl.cumsum(b_ties, 0) - b_ties
    b_position = tl.cumsum(b_above, 0) - b_above + tl.minimum(b_ties_before, left)
    b_quota = tl.minimum(tl.maximum(left - b_ties_before, 0), 0xFFFF)
    return at, b_position, b_quota, b_above + tl.minimum(b_ties, b_quota)


@triton.jit
def _slots(b_class, b_position, b_quota):
    """(which entries win, and where after the run's first winner they go)"""
    b_rank = tl.cumsum(b_class, 1)  # one scan ranks both classes
    b_tie_rank = b_rank >> 16
    b_wins = (b_class == 1) | ((b_class > 1) & (b_tie_rank <= b_quota[:, None]))
    b_slot = b_position[:, None] + (b_rank & 0xFFFF) + tl.minimum(b_tie_rank, b_quota[:, None]) - 1
    return b_wins, b_slot


@triton.jit
def _after(b_class, b_position, b_quota):
    """The rows' positions and quotas once these entries are written."""
    b_both = tl.sum(b_class, 1)
    b_won = tl.minimum(b_both >> 16, b_quota)
    return b_position + (b_both & 0xFFFF) + b_won, b_quota - b_won


@triton.jit
def _scatter(b_pointer, b_value, b_mask):
    """A store to scattered addresses, which as a block of one dimension stays where the rows were read."""
    SIZE: tl.constexpr = b_value.shape[0] * b_value.shape[1]
    tl.store(tl.reshape(b_pointer, (SIZE,)), tl.reshape(b_value, (SIZE,)), mask=tl.reshape(b_mask, (SIZE,)))


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
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the winners of a run, all of them in the list, in order, their indices counted from `origin`,
    and to err what they and the losers leave there. The first `quota` ties of all runs win."""
    # Asked for first: what the loop reads waits for it, and not for the places.
    b_base, b_length = listed_rows(p_tile, first_tile, stop_tile - first_tile, ROWS)
    at, b_position, b_quota, _ = _places(p_rows, p_groups, i_run, quota, ROWS, GROUP)
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
        b_wins, b_slot = _slots(b_class, b_position, b_quota)
        b_value = round_to(b_acc, p_values.dtype.element_ty)
        _scatter(p_values + b_slot, b_value, b_wins)
        b_place = b_local.to(tl.int32) + b_first[:, None]
        _scatter(p_indices + b_slot, (origin + start).to(p_indices.dtype.element_ty) + b_place, b_wins)
        b_residual = tl.where(b_wins, b_acc - widen(b_value), b_acc)
        b_cleared = b_valid & (is_finite(b_residual) == 0)
        b_residual = tl.where(b_cleared, 0.0, b_residual)
        b_left = left_by_stream(b_acc, expected)
        b_differs = b_residual.to(tl.int32, bitcast=True) != b_left.to(tl.int32, bitcast=True)
        _scatter(p_err + b_place, b_residual, b_valid & b_differs)
        cleared += tl.sum(tl.sum(b_cleared.to(tl.int32), 1), 0)
        b_position, b_quota = _after(b_class, b_position, b_quota)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")


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
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What `emit_listed` does for a run whose winners are all in err."""
    at, b_position, b_quota, b_winners = _places(p_rows, p_groups, i_run, quota, ROWS, GROUP)
    start = tl.cast(first_tile, tl.int64) * TILE
    b_first, b_length = shares_of_run(first_tile, run_tiles, n, TILE, ROWS)
    # err is read again only where a row has winners, or may have infinities that lose and must not stay.
    if threshold < INFINITY:
        b_length = tl.where(b_winners > 0, b_length, 0)
    p_values += at
    p_indices += at
    p_err += start
    cleared = tl.cast(0, tl.int32)
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_place = b_first[:, None] + b_entry[None, :]
        b_acc = canonical(tl.load(p_err + b_place, mask=b_valid, other=0.0))
        b_class = classify(b_acc, b_valid, threshold)
        b_wins, b_slot = _slots(b_class, b_position, b_quota)
        b_value = round_to(b_acc, p_values.dtype.element_ty)
        _scatter(p_values + b_slot, b_value, b_wins)
        _scatter(p_indices + b_slot, (origin + start).to(p_indices.dtype.element_ty) + b_place, b_wins)
        b_residual = tl.where(b_wins, b_acc - widen(b_value), b_acc)
        b_cleared = b_valid & (is_finite(b_residual) == 0)
        _scatter(p_err + b_place, tl.where(b_cleared, 0.0, b_residual), b_wins | b_cleared)
        cleared += tl.sum(tl.sum(b_cleared.to(tl.int32), 1), 0)
        b_position, b_quota = _after(b_class, b_position, b_quota)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")
