"""How many winners each tile has: those above the search's last interval, and the ties.

In the list, a program reads a run of tiles side by side, a row a tile, since to read them in turn would wait
for memory once a tile. Where winners are clustered, tiles with many of them are read by themselves, by
whichever program's turn it is; and so is every tile of err.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import canonical, magnitude_key
from gck.kernels.topk.gpu_control import LONG_TILES, NEAR
from gck.kernels.topk.gpu_stream import COUNT_MASK, TILE_WORDS, listed_rows, listed_tile

WIDE = tl.constexpr(2048)  # elements at a time of a tile that is read by itself
NOTED = tl.constexpr(256)  # tiles whose lengths are looked at together


@triton.jit
def note_long_tiles(p_tile, p_long, p_control, tiles, long):
    """Writes down which tiles have more than `long` candidates, of this program's share, in any order."""
    p_count = (p_control + LONG_TILES).to(tl.pointer_type(tl.int32)) + tl.zeros((NOTED,), tl.int32)
    for first in range(tl.program_id(0) * NOTED, tiles, tl.num_programs(0) * NOTED):
        b_tile = first + tl.arange(0, NOTED)
        b_counts = tl.load(p_tile + b_tile * TILE_WORDS + 1, mask=b_tile < tiles, other=0)
        b_long = (b_counts & COUNT_MASK) > long
        b_slot = tl.atomic_add(p_count, tl.full((NOTED,), 1, tl.int32), mask=b_long, sem="relaxed")
        tl.store(p_long + b_slot, b_tile.to(tl.int64), mask=b_long)


@triton.jit
def _classes(
    b_acc,
    b_valid,
    b_row,
    p_control,
    p_near,
    first_key,
    stop_key,
    apart_key,
    ROOM: tl.constexpr,
):
    """1 for each key from stop_key on, 65536 for each tie. Keys from first_key on that are below it are set
    apart, with their rows, if they reach apart_key, and else are ties."""
    b_key = magnitude_key(canonical(b_acc))
    b_close = b_valid & (b_key >= first_key) & (b_key < stop_key)
    b_apart = b_close & (b_key >= apart_key)
    p_taken = (p_control + NEAR).to(tl.pointer_type(tl.int32)) + tl.zeros_like(b_key)
    b_slot = tl.atomic_add(p_taken, tl.full(b_key.shape, 1, tl.int32), mask=b_apart, sem="relaxed")
    tl.store(p_near + b_slot, b_key, mask=b_apart)
    tl.store(p_near + ROOM + b_slot, tl.zeros_like(b_key) + b_row, mask=b_apart)
    return tl.where(b_valid & (b_key >= stop_key), 1, tl.where(b_close & (b_apart == 0), 65536, 0))


@triton.jit
def _add_to_group(p_groups, row, above, ties, GROUP: tl.constexpr):
    p_group = p_groups + 2 * (row // GROUP)
    if above > 0:
        tl.atomic_add(p_group, above.to(tl.int64), sem="relaxed")
    if ties > 0:
        tl.atomic_add(p_group + 1, ties.to(tl.int64), sem="relaxed")


@triton.jit
def _count_tile(
    p_source,
    length,
    surely,
    i_tile,
    p_rows,
    p_control,
    p_near,
    first_key,
    stop_key,
    apart_key,
    ROOM: tl.constexpr,
):
    """Counts the winners of one tile: `surely` so many, and those among `length` elements of the source.
    Returns (how many, ties)."""
    b_both = tl.zeros((WIDE,), tl.int32)
    for done in range(0, length, WIDE):
        b_entry = done + tl.arange(0, WIDE)
        b_valid = b_entry < length
        b_acc = tl.load(p_source + b_entry, mask=b_valid, other=0.0)
        b_both += _classes(b_acc, b_valid, i_tile, p_control, p_near, first_key, stop_key, apart_key, ROOM)
    both = tl.sum(b_both, 0) + surely
    tl.store(p_rows + i_tile, both)
    return both & 0xFFFF, both >> 16


@triton.jit
def count_scanned(
    p_err,
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    apart_key,
    tiles,
    n,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Counts the winners of this program's share of the tiles, all in err. Its tiles follow each other, so
    that it adds to the sums of a group or two."""
    share = tl.cdiv(tiles, tl.num_programs(0))
    first = tl.program_id(0) * share
    stop = tl.minimum(first + share, tiles)
    above, ties = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for i_tile in range(first, stop):
        start = tl.cast(i_tile, tl.int64) * TILE
        length = tl.minimum(n - start, TILE).to(tl.int32)
        more_above, more_ties = _count_tile(
            *(p_err + start, length, 0, i_tile, p_rows, p_control, p_near, first_key, stop_key),
            *(apart_key, ROOM),
        )
        above += more_above
        ties += more_ties
        if ((i_tile + 1) % GROUP == 0) | (i_tile + 1 == stop):
            _add_to_group(p_groups, i_tile, above, ties, GROUP)
            above = tl.cast(0, tl.int32)
            ties = tl.cast(0, tl.int32)


@triton.jit
def count_listed(
    p_source,
    in_bracket,
    p_tile,
    p_long,
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    apart_key,
    tiles,
    runs,
    clustered,
    long,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
    BRACKET: tl.constexpr,
):
    """Counts the winners of this program's share of the runs, and of the long tiles. The source is
    the list, or else the bracket's own, and what is listed but not there surely wins."""
    long = tl.where(clustered, long, TILE)
    for i_run in range(tl.program_id(0), runs, tl.num_programs(0)):
        # Not asked for a run ahead: of a block that a loop carries, Triton 3.6 reduces what it was at first.
        first = i_run * ROWS
        b_base, b_listed, b_close_base, b_close = listed_rows(p_tile, first, tiles - first, ROWS, BRACKET)
        b_base = tl.where(in_bracket, b_close_base, b_base)
        b_length = tl.where(in_bracket, b_close, b_listed)
        b_both = b_listed - b_length
        b_short = b_listed <= long
        b_length = tl.where(b_short, b_length, 0)
        b_row = first + tl.arange(0, ROWS)
        longest = tl.max(b_length, 0)
        for done in range(0, longest, BLOCK):
            b_entry = done + tl.arange(0, BLOCK)
            b_valid = b_entry[None, :] < b_length[:, None]
            b_acc = tl.load((p_source + b_base)[:, None] + b_entry[None, :], mask=b_valid, other=0.0)
            b_class = _classes(
                b_acc, b_valid, b_row[:, None], p_control, p_near, first_key, stop_key, apart_key, ROOM
            )
            b_both += tl.sum(b_class, 1)
        b_both = tl.where(b_short, b_both, 0)
        tl.store(p_rows + b_row, b_both, mask=b_short)
        above, ties = tl.sum(b_both & 0xFFFF, 0), tl.sum(b_both >> 16, 0)
        _add_to_group(p_groups, first, above, ties, GROUP)
    # Other programs wrote these, beside words that a nearer cache may still hold.
    long_tiles = tl.cast(0, tl.int32)
    if clustered:
        long_tiles = tl.load(p_control + LONG_TILES, cache_modifier=".cg").to(tl.int32)
    for i_long in range(tl.program_id(0), long_tiles, tl.num_programs(0)):
        i_tile = tl.load(p_long + i_long, cache_modifier=".cg").to(tl.int32)
        base, listed, close_base, close = listed_tile(p_tile, i_tile, BRACKET)
        base = tl.where(in_bracket, close_base, base)
        length = tl.where(in_bracket, close, listed)
        above, ties = _count_tile(
            *(p_source + base, length, listed - length, i_tile, p_rows, p_control, p_near),
            *(first_key, stop_key, apart_key, ROOM),
        )
        _add_to_group(p_groups, i_tile, above, ties, GROUP)
