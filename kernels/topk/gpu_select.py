"""Refining the threshold digit by digit, and counting winners.

A run is what one program counts or emits: some consecutive tiles, seen as ROWS rows that it reads side by
side, because reading them in turn would wait for memory once a row. In LIST mode a row is what the list
holds of a tile, else an equal share of the run's elements of err.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import canonical, magnitude_key
from gck.kernels.common.tiles import load_tile, tile_offsets
from gck.kernels.topk.gpu_control import HISTOGRAMS
from gck.kernels.topk.gpu_stream import listed_rows

ROWS = 8  # divides a tile; the most tiles of a run, where nothing says more
BLOCK = 64  # elements of a row at a time
GROUP = 256  # rows whose counts are also kept as one sum
RUN_WARPS = 8
REFINE_WARPS = 8


@triton.jit
def _digit_counts(
    p_source,
    i_tile,
    length,
    prefix,
    shift,
    bits,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_offset = tile_offsets(i_tile, TILE)
    b_key = magnitude_key(canonical(load_tile(p_source, b_offset, length, WHOLE)))
    b_match = (b_key >> (shift + bits)) == (prefix >> (shift + bits))
    if not WHOLE:
        b_match &= b_offset < length
    return tl.histogram((b_key >> shift) & ((1 << bits) - 1), BINS, mask=b_match)


@triton.jit
def refine_part(
    p_source,
    p_control,
    length,
    part,
    parts,
    prefix,
    digit,
    shift,
    bits,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts a digit, the `bits` bits from `shift` on, of the keys that begin with the prefix, in every
    parts-th tile of the source."""
    b_count = tl.zeros((BINS,), tl.int32)
    whole = tl.cast(length, tl.int64) // TILE
    for i_tile in range(tl.cast(part, tl.int64), whole, tl.cast(parts, tl.int64)):
        b_count += _digit_counts(p_source, i_tile, length, prefix, shift, bits, TILE, BINS, True)
    if (whole % parts == part) & (whole * TILE < length):
        b_count += _digit_counts(p_source, whole, length, prefix, shift, bits, TILE, BINS, False)
    p_histogram = p_control + HISTOGRAMS + digit * BINS + tl.arange(0, BINS)
    tl.atomic_add(p_histogram, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def classify(b_acc, b_valid, threshold):
    """1 for each element above the threshold, 65536 for each tie, else 0: one sum counts both."""
    b_key = magnitude_key(b_acc)
    b_class = tl.where(b_key > threshold, 1, tl.where(b_key == threshold, 65536, 0))
    return tl.where(b_valid, b_class, 0)


@triton.jit
def shares_of_run(first_tile, run_tiles, n, TILE: tl.constexpr, ROWS: tl.constexpr):
    """(place in the run, length) of each of ROWS equal shares of a run of a vector of n elements."""
    span = run_tiles * (TILE // ROWS)
    b_first = tl.arange(0, ROWS) * span
    b_left = n - (tl.cast(first_tile, tl.int64) * TILE + b_first)
    return b_first, tl.minimum(tl.maximum(b_left, 0), span).to(tl.int32)


@triton.jit
def store_counts(p_rows, p_groups, i_run, b_both, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Stores what the classes of each row of a run add up to, and adds it to the sums of the rows' group."""
    tl.store(p_rows + i_run * ROWS + tl.arange(0, ROWS), b_both)
    above = tl.sum(b_both & 0xFFFF, 0).to(tl.int64)
    ties = tl.sum(b_both >> 16, 0).to(tl.int64)
    p_group = p_groups + 2 * (i_run * ROWS // GROUP)
    if above > 0:
        tl.atomic_add(p_group, above, sem="relaxed")
    if ties > 0:
        tl.atomic_add(p_group + 1, ties, sem="relaxed")


@triton.jit
def count_run(
    p_list,
    p_err,
    p_tile,
    p_rows,
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
    """Counts what lies above the threshold and what ties with it, by row and by group of rows."""
    if in_list:
        p_source = p_list
        b_base, b_length, _base, _length = listed_rows(
            p_tile, first_tile, stop_tile - first_tile, ROWS, False
        )
    else:
        p_source = p_err + tl.cast(first_tile, tl.int64) * TILE
        b_first, b_length = shares_of_run(first_tile, run_tiles, n, TILE, ROWS)
        b_base = b_first.to(tl.int64)
    b_class = tl.zeros((ROWS, BLOCK), tl.int32)
    longest = tl.max(b_length, 0)
    for done in range(0, longest, BLOCK):
        b_entry = done + tl.arange(0, BLOCK)
        b_valid = b_entry[None, :] < b_length[:, None]
        b_acc = tl.load((p_source + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0)
        b_class += classify(canonical(b_acc), b_valid, threshold)
    store_counts(p_rows, p_groups, i_run, tl.sum(b_class, 1), ROWS, GROUP)
