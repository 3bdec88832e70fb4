"""Many matrices of one shape in one launch: the third dimension of its grid says which, and a table where.

A row of the table has the addresses of a matrix' tensors, in the order in which kernels name them, and then
the matrix' place in the call. One matrix needs no table: addresses are arguments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.tables import KeptTables, to_device

if TYPE_CHECKING:
    from gck.kernels.low_rank.matrices import Matrices, Shape

MOST = 32768  # matrices of a launch: a grid may have no more than 65535 in its third dimension
# Where addresses are: arguments; in the table; there, and all are multiples of 16 bytes.
ONE, MANY, ALIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def tensor_of(p_one, p_table, PLACE: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr):
    """Of the program's matrix the tensor with this place among WORDS; of ONE that is p_one, its like."""
    if KIND == ONE:
        return p_one
    else:
        word = tl.load(p_table + tl.program_id(2).to(tl.int64) * (WORDS + 1) + PLACE)
        if KIND == ALIGNED:
            return tl.multiple_of(word.to(p_one.dtype), 16)
        else:
            return word.to(p_one.dtype)


@triton.jit
def place_of(p_table, WORDS: tl.constexpr, KIND: tl.constexpr):
    """Which of the call's matrices a program has."""
    if KIND == ONE:
        return tl.cast(0, tl.int64)
    else:
        return tl.load(p_table + tl.program_id(2).to(tl.int64) * (WORDS + 1) + WORDS)


class Launch(NamedTuple):
    """Matrices of one shape.

    Attributes:
        first: place of the first one in the call.
        many: how many.
        tensors: of the first one.
        table: int64, a row each; of one matrix anything.
        kind: ONE, MANY or ALIGNED.
    """

    numel: int
    shape: Shape
    first: int
    many: int
    tensors: list[Tensor]
    table: Tensor
    kind: int


# Of some dozen buckets, a few for each.
_tables: KeptTables[tuple[Tensor, Tensor]] = KeptTables(512)


def launches(matrices: Matrices, *tensors: Sequence[Tensor]) -> Iterator[Launch]:
    """One for all matrices of the same shape, whose first tensor has the same dtype.

    Args:
        tensors: those of all matrices, at each place of the table.
    """
    groups: list[list[int]] = []
    for alike in matrices.alike:
        for dtype in {tensors[0][i].dtype: None for i in alike}:
            those = [i for i in alike if tensors[0][i].dtype is dtype]
            groups += [those[start : start + MOST] for start in range(0, len(those), MOST)]
    addresses = [[tensor.data_ptr() for tensor in each] for each in tensors]
    rows = [(*[each[i] for each in addresses], i) for group in groups if len(group) > 1 for i in group]
    table, device, row = tensors[0][0], tensors[0][0].device, 0
    if rows:
        key = device, tuple(rows)
        _, table = _tables.get(key, device, lambda: to_device(torch.tensor(rows, device="cpu"), device))
    for group in groups:
        first, kind = group[0], ONE
        part = table
        if len(group) > 1:
            part, row = table[row : row + len(group)], row + len(group)
            aligned = all(each[i] % 16 == 0 for each in addresses for i in group)
            kind = ALIGNED if aligned else MANY
        given = [each[first] for each in tensors]
        shape = matrices.numels[first], matrices.shapes[first]
        yield Launch(*shape, first, len(group), given, part, kind.value)
