"""Tiles of a matrix that lies row by row in a vector, which may end within the last row.

A row's length is a multiple of UNIT elements, which kernels are compiled for: a thread then loads 16 bytes at
a time. Addresses are 64 bits wide, and so are rows and columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

LANES = tl.constexpr(64)  # columns of a tile: sums that the products of a row are added to in turn
MOST_TOGETHER = 8  # rows of left or of right that a thread has sums of at the same time


def unit_of(columns: int) -> int:
    """What a row's length is a multiple of: whole tiles need no masks."""
    return next(unit for unit in (LANES.value, 4, 1) if columns % unit == 0)


@triton.jit
def tiles_of(columns):
    return (columns + LANES - 1) // LANES


@triton.jit
def zeros_of(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """So many blocks of fp32 zeros."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks += (tl.zeros(SHAPE, tl.float32),)
    return blocks


@triton.jit
def load_columns(p_row, b_column, columns, UNIT: tl.constexpr):
    """Elements of a row, LANES of them, 0 past its end."""
    if UNIT == LANES:
        return tl.load(p_row + b_column)
    else:
        return tl.load(p_row + b_column, mask=b_column < columns, other=0.0)


@triton.jit
def inside(b_at, b_column, n, columns):
    """Whether elements of a tile, the b_at-th of the vector, exist."""
    return (b_column < columns)[None, :] & (b_at < n)


@triton.jit
def load_elements(p_source, b_at, b_column, n, columns, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    """(ROWS, LANES) elements of a tile, 0 where there are none. WHOLE: all its rows are as long as others."""
    if WHOLE and UNIT == LANES:
        return tl.load(p_source + b_at)
    elif WHOLE:
        return tl.load(p_source + b_at, mask=(b_column < columns)[None, :], other=0.0)
    else:
        return tl.load(p_source + b_at, mask=inside(b_at, b_column, n, columns), other=0.0)


@triton.jit
def store_elements(p_target, b_at, b_x, b_column, n, columns, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE and UNIT == LANES:
        tl.store(p_target + b_at, b_x)
    elif WHOLE:
        tl.store(p_target + b_at, b_x, mask=(b_column < columns)[None, :])
    else:
        tl.store(p_target + b_at, b_x, mask=inside(b_at, b_column, n, columns))
