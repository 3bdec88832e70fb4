"""The products of rows of left with the columns of the matrix, of blocks of rows; then their sums."""

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
from gck.kernels.low_rank.gpu_many import ONE, launches, tensor_of
from gck.kernels.low_rank.gpu_matrix import MOST_TOGETHER, unit_of, zeros_of

ROW_BLOCK = 256  # rows whose products are added one after the other
# Columns a program, of few rows of left and of more: a thread has registers for the sums of so many.
COLUMNS, FEWER_COLUMNS = 128, 64
# Rows that are on their way at the same time: few threads have work, as each adds up 256 rows.
TOGETHER = 16
PARTS = 64  # sums a program of `add_parts_kernel`


@triton.jit
def _add_rows(
    b_sums,
    p_acc,
    p_left,
    row,
    end,
    limit,
    rows,
    columns,
    b_column,
    TOGETHER: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """b_sums and the products of TOGETHER rows, as far as `end` and the `limit`-th element."""
    loaded = ()
    for i in tl.static_range(TOGETHER):
        b_at = (row + i) * columns + b_column
        if WHOLE:
            loaded += (tl.load(p_acc + b_at, mask=b_column < columns, other=0.0),)
        else:
            loaded += (tl.load(p_acc + b_at, mask=(b_column < columns) & (b_at < limit), other=0.0),)
    for i in tl.static_range(TOGETHER):
        added = ()
        for j in tl.static_range(COUNT):
            p_factor = p_left + j * rows + row + i
            # A row that is not there adds 0 * 0, which changes no sum: none is -0.0.
            factor = tl.load(p_factor) if WHOLE else tl.load(p_factor, mask=row + i < end, other=0.0)
            added += (b_sums[j] + loaded[i] * factor,)
        b_sums = added
    return b_sums


@triton.jit(do_not_specialize=["n", "rows", "units", "rank"])
def back_project_kernel(
    p_acc,
    p_left,
    p_right,
    p_table,
    p_parts,
    n,
    rows,
    units,
    rank,
    ROW_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    COUNT: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
):
    """A program owns COLUMNS columns of ROW_BLOCK rows, and COUNT rows of left: those of the last one overlap
    with what another one writes, which is the same. p_parts: (matrices, blocks of rows, rank, columns)."""
    p_acc = tensor_of(p_acc, p_table, 0, 3, KIND)
    p_left = tensor_of(p_left, p_table, 1, 3, KIND)
    columns = tl.cast(units, tl.int64) * UNIT
    rows = tl.cast(rows, tl.int64)
    n = tl.cast(n, tl.int64)
    tiles = ((columns + COLUMNS - 1) // COLUMNS).to(tl.int32)  # a division by 64 bits takes long
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    b_column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.minimum(tl.program_id(1) * COUNT, rank - COUNT).to(tl.int64)
    p_left += first * rows
    row = i_block * ROW_BLOCK
    end = tl.minimum(row + ROW_BLOCK, rows)
    batches = (tl.minimum(end, n // columns) - row) // TOGETHER
    b_sums = zeros_of(COUNT, (COLUMNS,))
    given = (p_acc, p_left)
    limits = (end, n, rows, columns, b_column)
    for _ in range(batches):
        b_sums = _add_rows(b_sums, *given, row, *limits, TOGETHER, COUNT, True)
        row += TOGETHER
    limits = (end, tl.minimum(n, end * columns), rows, columns, b_column)
    if row < end:
        b_sums = _add_rows(b_sums, *given, row, *limits, TOGETHER, COUNT, False)
    if KIND != ONE:
        i_block += tl.program_id(2) * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)
    p_parts += (i_block * rank + first) * columns
    for j in tl.static_range(COUNT):
        tl.store(p_parts + j * columns + b_column, b_sums[j], mask=b_column < columns)


@triton.jit(do_not_specialize=["count", "parts"])
def add_parts_kernel(
    p_acc,
    p_left,
    p_right,
    p_table,
    p_parts,
    count,
    parts,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    KIND: tl.constexpr,
):
    """The sums of `parts` rows of `count` numbers, in order."""
    p_right = tensor_of(p_right, p_table, 2, 3, KIND)
    count = tl.cast(count, tl.int64)
    p_parts += tl.program_id(2) * (count * parts)
    b_at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, parts, TOGETHER):
        loaded = ()
        for k in tl.static_range(TOGETHER):
            part = tl.cast(i, tl.int64) + k
            here = tl.where(part < parts, count, 0)
            loaded += (tl.load(p_parts + part * count + b_at, mask=b_at < here, other=0.0),)
        for k in tl.static_range(TOGETHER):
            b_sum += loaded[k]
    tl.store(p_right + b_at, canonical(b_sum), mask=b_at < count)


def back_project_options(columns: int, rank: int) -> dict[str, Any]:
    """Compile-time values of `back_project_kernel`."""
    return {
        "ROW_BLOCK": ROW_BLOCK,
        "COLUMNS": COLUMNS if rank <= MOST_TOGETHER // 2 else FEWER_COLUMNS,
        "TOGETHER": TOGETHER,
        "COUNT": min(rank, MOST_TOGETHER),
        "UNIT": unit_of(columns),
    }


def back_project_(
    matrices: Any, accs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    with launching_on(accs[0]):
        for n, (rows, columns, rank), _, many, tensors, table, kind in launches(
            matrices, accs, lefts, rights
        ):
            options = back_project_options(columns, rank)
            blocks, count = triton.cdiv(rows, ROW_BLOCK), rank * columns
            parts = torch.empty((many, blocks, count), dtype=torch.float32, device=accs[0].device)
            tiles = triton.cdiv(columns, options["COLUMNS"]) * blocks
            given = (*tensors, table, parts)
            same = {"TOGETHER": TOGETHER, "KIND": kind, "num_warps": 1, **EXACT}
            back_project_kernel[(tiles, triton.cdiv(rank, options["COUNT"]), many)](
                *given, n, rows, columns // options["UNIT"], rank, **(options | same)
            )
            add_parts_kernel[(triton.cdiv(count, PARTS), 1, many)](*given, count, blocks, BLOCK=PARTS, **same)
