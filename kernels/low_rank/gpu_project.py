"""acc, and the products of its rows with those of a basis: in one pass over the matrix.

A program owns ROWS rows and goes through their tiles in turn, so that a thread adds to sums in registers. Of
a rank above MOST_TOGETHER, further programs read what the first ones have stored.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import accumulate, canonical
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.residual import read_residual, residual_arguments
from gck.kernels.common.tree import halving_sum
from gck.kernels.low_rank.gpu_many import launches, tensor_of
from gck.kernels.low_rank.gpu_matrix import (
    LANES,
    MOST_TOGETHER,
    load_columns,
    load_elements,
    store_elements,
    tiles_of,
    unit_of,
    zeros_of,
)

ROWS = 8
TILES = 4  # of a row, which are on their way at the same time
WARPS = 4
LEVELS = tl.constexpr(6)  # LANES is 2**LEVELS


@triton.jit
def _add_tiles(
    b_lanes,
    p_grad,
    p_err,
    p_basis,
    p_acc,
    b_row_at,
    column,
    n,
    columns,
    decay,
    p_clip,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """b_lanes and the products of TILES tiles, from `column` on. All are asked for before any is stored."""
    loaded = ()
    for i in tl.static_range(TILES):
        b_column = column + i * LANES + tl.arange(0, LANES)
        b_at = b_row_at + b_column[None, :]
        if FIRST:
            b_err = load_elements(p_err, b_at, b_column, n, columns, UNIT, WHOLE)
            b_grad = load_elements(p_grad, b_at, b_column, n, columns, UNIT, WHOLE)
            loaded += ((b_err, b_grad),)
        else:
            loaded += ((load_elements(p_acc, b_at, b_column, n, columns, UNIT, WHOLE),),)
    for i in tl.static_range(TILES):
        b_column = column + i * LANES + tl.arange(0, LANES)
        b_acc = loaded[i][0]
        if FIRST:
            b_acc = accumulate(loaded[i][1], read_residual(b_acc, decay, p_clip, RESIDUAL))
            store_elements(p_acc, b_row_at + b_column[None, :], b_acc, b_column, n, columns, UNIT, WHOLE)
        added = ()
        for j in tl.static_range(COUNT):
            b_basis = load_columns(p_basis + j * columns, b_column, columns, UNIT)
            added += (b_lanes[j] + b_acc * b_basis[None, :],)
        b_lanes = added
    return b_lanes


@triton.jit
def _project_rows(
    p_grad,
    p_err,
    p_basis,
    p_acc,
    p_left,
    row,
    n,
    rows,
    columns,
    decay,
    p_clip,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_row = row + tl.arange(0, ROWS)
    b_row_at = (b_row * columns)[:, None]
    b_lanes = zeros_of(COUNT, (ROWS, LANES))
    tiles = tiles_of(columns)
    given = (p_grad, p_err, p_basis, p_acc, b_row_at)
    limits = (n, columns, decay, p_clip)
    for i in range(tiles // TILES):
        column = tl.cast(i, tl.int64) * (TILES * LANES)
        b_lanes = _add_tiles(b_lanes, *given, column, *limits, TILES, COUNT, RESIDUAL, FIRST, UNIT, WHOLE)
    for i in range(tiles // TILES * TILES, tiles):
        column = tl.cast(i, tl.int64) * LANES
        b_lanes = _add_tiles(b_lanes, *given, column, *limits, 1, COUNT, RESIDUAL, FIRST, UNIT, WHOLE)
    for j in tl.static_range(COUNT):
        b_sum = canonical(halving_sum(b_lanes[j], ROWS, LEVELS))
        tl.store(p_left + j * rows + b_row, b_sum, mask=b_row < rows)


@triton.jit(do_not_specialize=["n", "rows", "units", "rank"])
def project_kernel(
    p_grad,
    p_err,
    p_basis,
    p_acc,
    p_left,
    p_table,
    n,
    rows,
    units,
    rank,
    decay,
    p_clip,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
):
    """FIRST: of the first COUNT rows of the basis, and acc is written. Else of the others, COUNT together:
    those of the last program overlap with what another one writes, which is the same."""
    p_grad = tensor_of(p_grad, p_table, 0, 5, KIND)
    p_err = tensor_of(p_err, p_table, 1, 5, KIND)
    p_basis = tensor_of(p_basis, p_table, 2, 5, KIND)
    p_acc = tensor_of(p_acc, p_table, 3, 5, KIND)
    p_left = tensor_of(p_left, p_table, 4, 5, KIND)
    columns = tl.cast(units, tl.int64) * UNIT
    rows = tl.cast(rows, tl.int64)
    n = tl.cast(n, tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if not FIRST:
        first = tl.minimum((tl.program_id(1) + 1) * COUNT, rank - COUNT).to(tl.int64)
        p_basis += first * columns
        p_left += first * rows
    given = (p_grad, p_err, p_basis, p_acc, p_left, row, n, rows, columns, decay, p_clip)
    if (row + ROWS) * columns <= n:
        _project_rows(*given, ROWS, TILES, COUNT, RESIDUAL, FIRST, UNIT, True)
    else:
        _project_rows(*given, ROWS, 1, COUNT, RESIDUAL, FIRST, UNIT, False)


def project_options(columns: int, rank: int) -> dict[str, Any]:
    """Compile-time values of `project_kernel`."""
    return {"ROWS": ROWS, "TILES": TILES, "COUNT": min(rank, MOST_TOGETHER), "UNIT": unit_of(columns)}


def project_(
    matrices: Any,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    bases: Sequence[Tensor],
    accs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    clip: Tensor | None,
) -> None:
    decay, p_clip, residual = residual_arguments(matrices.decay, errs[0], clip)
    with launching_on(errs[0]):
        for n, (rows, columns, rank), _, count, tensors, table, kind in launches(
            matrices, grads, errs, bases, accs, lefts
        ):
            options = project_options(columns, rank)
            blocks = triton.cdiv(rows, ROWS)
            groups = triton.cdiv(rank, options["COUNT"])
            given = (*tensors, table, n, rows, columns // options["UNIT"], rank, decay, p_clip)
            options |= {"RESIDUAL": residual, "KIND": kind, "num_warps": WARPS, **EXACT}
            project_kernel[(blocks, 1, count)](*given, FIRST=True, **options)
            if groups > 1:
                project_kernel[(blocks, groups - 1, count)](*given, FIRST=False, **options)
