"""Tiles: a long vector cut into equal parts, of which only the last may be shorter."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


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


@triton.jit
def columns(x):
    """The four columns of a block of rows of 4."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3
