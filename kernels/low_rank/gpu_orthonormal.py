"""Rows of left made orthonormal: the fp64 products of all pairs of them, and their Cholesky factor.

It is so small that each program of the second kernel makes it anew, beside the rows' elements that it owns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import canonical
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.tree import halving_sum
from gck.kernels.low_rank.gpu_many import launches, tensor_of

LEVELS = tl.constexpr(10)
LANES = tl.constexpr(2**LEVELS.value)
TILES = 4  # of LANES, which are on their way at the same time
ELEMENTS = 1024  # of left, a program of `orthonormal_kernel`
WARPS = 4
# Of a row, the part of its squares that must be left when its share of the rows before it is taken away.
LEAST_LEFT = tl.constexpr(2.0**-40)


@triton.jit
def _add_tiles(b_lanes, p_one, p_other, row, rows, TILES: tl.constexpr):
    """b_lanes and the products of TILES tiles, from `row` on."""
    loaded = ()
    for k in tl.static_range(TILES):
        b_row = row + k * LANES + tl.arange(0, LANES)
        b_one = tl.load(p_one + b_row, mask=b_row < rows, other=0.0)
        loaded += ((b_one, tl.load(p_other + b_row, mask=b_row < rows, other=0.0)),)
    for k in tl.static_range(TILES):
        b_lanes += loaded[k][0].to(tl.float64) * loaded[k][1].to(tl.float64)
    return b_lanes


@triton.jit(do_not_specialize=["rows", "rank"])
def gram_kernel(p_left, p_table, p_gram, rows, rank, TILES: tl.constexpr, KIND: tl.constexpr):
    """The product of a row of left and of one of the rank // 2 after it, in a circle: both places of it in
    (rank, rank) fp64, of each matrix."""
    p_left = tensor_of(p_left, p_table, 0, 1, KIND)
    p_gram += tl.program_id(2) * rank * rank
    i = tl.program_id(0)
    j = i + tl.program_id(1)
    j = tl.where(j >= rank, j - rank, j)
    rows = tl.cast(rows, tl.int64)
    p_one = p_left + i * rows
    p_other = p_left + j * rows
    tiles = (rows + LANES - 1) // LANES
    b_lanes = tl.zeros((LANES,), tl.float64)
    for t in range(tiles // TILES):
        b_lanes = _add_tiles(b_lanes, p_one, p_other, tl.cast(t, tl.int64) * (TILES * LANES), rows, TILES)
    for t in range(tiles // TILES * TILES, tiles):
        b_lanes = _add_tiles(b_lanes, p_one, p_other, tl.cast(t, tl.int64) * LANES, rows, 1)
    b_sum = halving_sum(tl.reshape(b_lanes, (1, LANES)), 1, LEVELS)
    tl.store(p_gram + i * rank + j + tl.arange(0, 1), b_sum)
    tl.store(p_gram + j * rank + i + tl.arange(0, 1), b_sum)


@triton.jit(do_not_specialize=["rows", "rank"])
def orthonormal_kernel(
    p_left, p_table, p_gram, rows, rank, RANK: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    """A program owns BLOCK elements of each row of left, of which there are at most RANK.

    Right-looking: row j is divided by its length, and then taken away from those after it. Sums with one
    element that is not zero pick it: no rounding, whatever their order.
    """
    p_left = tensor_of(p_left, p_table, 0, 1, KIND)
    p_gram += tl.program_id(2) * rank * rank
    rows = tl.cast(rows, tl.int64)
    b_one = tl.arange(0, RANK)
    b_other = tl.arange(0, RANK)
    b_pair = (b_one < rank)[:, None] & (b_other < rank)[None, :]
    b_gram = tl.load(p_gram + b_one[:, None] * rank + b_other[None, :], mask=b_pair, other=0.0)
    b_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_inside = (b_one < rank)[:, None] & (b_row < rows)[None, :]
    p_element = p_left + b_one[:, None] * rows + b_row[None, :]
    b_left = tl.load(p_element, mask=b_inside, other=0.0).to(tl.float64)
    for j in range(rank):
        b_column = tl.sum(tl.where(b_other[None, :] == j, b_gram, 0.0), 1)
        pivot = tl.sum(tl.where(b_one == j, b_column, 0.0), 0)
        square = tl.load(p_gram + j * rank + j)
        # A NaN is neither: it spreads.
        dropped = (pivot < square * LEAST_LEFT) | (pivot == 0)
        root = tl.where(dropped, 1.0, tl.sqrt(pivot))
        after = tl.where(dropped, RANK, j)  # rows after it are changed
        b_factor = tl.where(b_one > after, b_column / root, 0.0)
        b_gram -= b_factor[:, None] * tl.reshape(b_factor, (1, RANK))
        b_unit = tl.sum(tl.where((b_one == j)[:, None], b_left, 0.0), 0) / root
        b_unit = tl.where(dropped, 0.0, b_unit)
        b_less = b_left - b_factor[:, None] * b_unit[None, :]
        b_left = tl.where((b_one > after)[:, None], b_less, b_left)
        b_left = tl.where((b_one == j)[:, None], b_unit[None, :], b_left)
    tl.store(p_element, canonical((b_left + 0.0).to(tl.float32)), mask=b_inside)  # -0.0 becomes 0.0


def orthonormal_options(rank: int) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `orthonormal_kernel`."""
    most = triton.next_power_of_2(rank)
    # Products of all pairs of 64 rows are four times what there is of the rows.
    return {"RANK": most, "BLOCK": ELEMENTS // most}, 2 * WARPS if most > 16 else WARPS


def orthonormalise_(matrices: Any, lefts: Sequence[Tensor]) -> None:
    with launching_on(lefts[0]):
        for _, (rows, _, rank), _, count, tensors, table, kind in launches(matrices, lefts):
            options, num_warps = orthonormal_options(rank)
            gram = torch.empty((count, rank, rank), dtype=torch.float64, device=lefts[0].device)
            given = (*tensors, table, gram, rows, rank)
            same = {"KIND": kind, **EXACT}
            blocks = triton.cdiv(rows, options["BLOCK"])
            for _ in range(2):  # once leaves rows whose angles are off where they were nearly in one plane
                gram_kernel[(rank, rank // 2 + 1, count)](*given, TILES=TILES, num_warps=WARPS, **same)
                orthonormal_kernel[(blocks, 1, count)](*given, **options, num_warps=num_warps, **same)
