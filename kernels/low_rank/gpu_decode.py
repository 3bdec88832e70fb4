"""Products of left and right: taken away from acc, or written to a dense vector."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import count_cleared, is_finite
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.low_rank.gpu_many import ONE, launches, place_of, tensor_of
from gck.kernels.low_rank.gpu_matrix import (
    LANES,
    inside,
    load_columns,
    load_elements,
    store_elements,
    tiles_of,
    unit_of,
)

ROWS = 16
WARPS = 4


@triton.jit
def _decoded(
    p_left,
    p_right,
    b_row,
    b_column,
    rows,
    columns,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(ROWS, LANES) of the product of left and right.

    Not a loop: through one, the compiler would not carry the layout of the tile to what is loaded here, and
    each iteration would exchange it between threads.
    """
    b_dense = tl.zeros((ROWS, LANES), tl.float32)
    for j in tl.static_range(RANK):
        b_left = tl.load(p_left + j * rows + b_row, mask=b_row < rows, other=0.0)
        b_right = load_columns(p_right + j * columns, b_column, columns, UNIT)
        b_dense += b_left[:, None] * b_right[None, :]
    return b_dense


@triton.jit
def _settle_tile(
    p_acc,
    p_err,
    p_left,
    p_right,
    p_nonfinite,
    b_row,
    b_column,
    n,
    rows,
    columns,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_at = (b_row * columns)[:, None] + b_column[None, :]
    b_acc = load_elements(p_acc, b_at, b_column, n, columns, UNIT, WHOLE)
    b_dense = _decoded(p_left, p_right, b_row, b_column, rows, columns, RANK, ROWS, UNIT)
    b_rest = b_acc - b_dense
    b_lost = is_finite(b_rest) == 0
    if not (WHOLE and UNIT == LANES):
        b_lost &= inside(b_at, b_column, n, columns)
    store_elements(p_err, b_at, tl.where(b_lost, 0.0, b_rest), b_column, n, columns, UNIT, WHOLE)
    count_cleared(p_nonfinite, b_lost)


@triton.jit
def _place(n, units, ROWS: tl.constexpr, UNIT: tl.constexpr):
    """(rows, columns) of a program's tile, how many columns there are, and whether the tile's rows are all as
    long as others."""
    columns = tl.cast(units, tl.int64) * UNIT
    tiles = tiles_of(columns).to(tl.int32)  # a division by 64 bits takes long
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    b_column = (tl.program_id(0) % tiles).to(tl.int64) * LANES + tl.arange(0, LANES)
    return row + tl.arange(0, ROWS), b_column, columns, (row + ROWS) * columns <= n


@triton.jit(do_not_specialize=["n", "rows", "units"])
def settle_kernel(
    p_acc,
    p_err,
    p_left,
    p_right,
    p_table,
    p_nonfinite,
    n,
    rows,
    units,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
):
    """err becomes acc - left right, or 0 where that is not finite, which is counted, of each matrix."""
    p_acc = tensor_of(p_acc, p_table, 0, 4, KIND)
    p_err = tensor_of(p_err, p_table, 1, 4, KIND)
    p_left = tensor_of(p_left, p_table, 2, 4, KIND)
    p_right = tensor_of(p_right, p_table, 3, 4, KIND)
    p_nonfinite += place_of(p_table, 4, KIND)
    b_row, b_column, columns, whole = _place(n, units, ROWS, UNIT)
    limits = (tl.cast(n, tl.int64), tl.cast(rows, tl.int64), columns)
    given = (p_acc, p_err, p_left, p_right, p_nonfinite, b_row, b_column)
    if whole:
        _settle_tile(*given, *limits, RANK, ROWS, UNIT, True)
    else:
        _settle_tile(*given, *limits, RANK, ROWS, UNIT, False)


@triton.jit
def _decompress_tile(
    p_out,
    p_left,
    p_right,
    b_row,
    b_column,
    n,
    rows,
    columns,
    alpha,
    ADD: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_at = (b_row * columns)[:, None] + b_column[None, :]
    if ADD:
        b_out = load_elements(p_out, b_at, b_column, n, columns, UNIT, WHOLE)
    b_dense = _decoded(p_left, p_right, b_row, b_column, rows, columns, RANK, ROWS, UNIT) * alpha
    if ADD:
        b_dense = b_out + b_dense
    store_elements(p_out, b_at, b_dense, b_column, n, columns, UNIT, WHOLE)


@triton.jit(do_not_specialize=["n", "rows", "units"])
def decompress_kernel(
    p_out,
    p_left,
    p_right,
    p_table,
    n,
    rows,
    units,
    alpha,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
):
    """ADD: alpha times the product is added, else it is written."""
    p_out = tensor_of(p_out, p_table, 0, 3, KIND)
    p_left = tensor_of(p_left, p_table, 1, 3, KIND)
    p_right = tensor_of(p_right, p_table, 2, 3, KIND)
    b_row, b_column, columns, whole = _place(n, units, ROWS, UNIT)
    limits = (tl.cast(n, tl.int64), tl.cast(rows, tl.int64), columns, alpha)
    if whole:
        _decompress_tile(p_out, p_left, p_right, b_row, b_column, *limits, ADD, RANK, ROWS, UNIT, True)
    else:
        _decompress_tile(p_out, p_left, p_right, b_row, b_column, *limits, ADD, RANK, ROWS, UNIT, False)


def decode_options(columns: int, rank: int) -> dict[str, Any]:
    """Compile-time values of `settle_kernel` and `decompress_kernel`."""
    return {"ROWS": ROWS, "RANK": rank, "UNIT": unit_of(columns)}


def settle_(
    matrices: Any,
    accs: Sequence[Tensor],
    errs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    cleared: Tensor | None,
) -> None:
    if cleared is None:
        cleared = torch.zeros(len(accs), dtype=torch.int64, device=accs[0].device)
    with launching_on(accs[0]):
        for n, (rows, columns, rank), first, count, tensors, table, kind in launches(
            matrices, accs, errs, lefts, rights
        ):
            options = decode_options(columns, rank)
            settle_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, LANES.value), 1, count)](
                *tensors,
                table,
                cleared[first:] if kind == ONE.value else cleared,
                n,
                rows,
                columns // options["UNIT"],
                **options,
                KIND=kind,
                num_warps=WARPS,
                **EXACT,
            )


def product_(
    matrices: Any,
    outs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    alpha: float,
    accumulate: bool,
) -> None:
    with launching_on(outs[0]):
        for n, (rows, columns, rank), _, count, tensors, table, kind in launches(
            matrices, outs, lefts, rights
        ):
            options = decode_options(columns, rank)
            decompress_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, LANES.value), 1, count)](
                *tensors,
                table,
                n,
                rows,
                columns // options["UNIT"],
                alpha,
                ADD=accumulate,
                **options,
                KIND=kind,
                num_warps=WARPS,
                **EXACT,
            )
