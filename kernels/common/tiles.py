"""Runs of tiles: one long vector cut between programs, each of which walks its own run in order."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def run_of_tiles(i_program, tiles, n, TILE: tl.constexpr):
    """(first tile, end of its whole tiles, end of all its tiles) of a program's run of `tiles` tiles."""
    first = i_program.to(tl.int64) * tiles
    stop = tl.minimum((first + tiles) * TILE, tl.cast(n, tl.int64))
    return first, tl.maximum(stop // TILE, first), tl.cdiv(stop, TILE)


@triton.jit
def tile_offsets(i_tile, TILE: tl.constexpr):
    return tl.cast(i_tile, tl.int64) * TILE + tl.arange(0, TILE)


@triton.jit
def load_tile(p_source, b_offset, n, WHOLE: tl.constexpr):
    """Elements of a tile, 0 past n. WHOLE tiles go without a mask.

    A mask that ends at just any n would make the compiler load element by element.
    """
    if WHOLE:
        return tl.load(p_source + b_offset)
    else:
        return tl.load(p_source + b_offset, mask=b_offset < n, other=0.0)
