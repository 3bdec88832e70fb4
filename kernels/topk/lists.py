"""Where the payloads of a list of tensors lie: one behind the other, in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gck.payload import index_dtype
from gck.wire import Layout

__all__ = ["Bodies", "bodies_of"]


# Compared by identity, since it is made once for what it follows from, and what follows from it is kept too.
@dataclass(frozen=True, eq=False)
class Bodies:
    """Layouts of the bodies, and where they start.

    Attributes:
        numels: elements of the vector that each payload is of.
        starts: first byte of each body; multiples of 16.
        nbytes: of all.
        pieces: what all memory is cut into to have the values, in elements: a gap before each field, and it;
            and a gap. And the same of indices. None where indices are not all of 32 bits.
    """

    value_dtype: torch.dtype
    numels: tuple[int, ...]
    layouts: tuple[Layout, ...]
    starts: tuple[int, ...]
    nbytes: int
    pieces: tuple[list[int], list[int]] | None

    def offset(self, body: int, which: int) -> int:
        """First byte of a body's field."""
        return self.starts[body] + self.layouts[body].fields[which].offset

    def fields(self, memory: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Typed views of (nbytes,) uint8: the values of each payload, and the indices of each."""
        if self.pieces is None:
            parts = memory.split([layout.nbytes for layout in self.layouts])
            views = [layout.views(part) for layout, part in zip(self.layouts, parts, strict=True)]
            return [values for values, _ in views], [indices for _, indices in views]
        # All at once, with what is between them: faster than a slice for each.
        values, indices = self.pieces
        return (
            memory.view(self.value_dtype).split_with_sizes(values)[1::2],
            memory.view(torch.int32).split_with_sizes(indices)[1::2],
        )


def bodies_of(numels: Sequence[int], counts: Sequence[int], value_dtype: torch.dtype) -> Bodies:
    """Of payloads of counts[i] entries, from vectors of numels[i] elements."""
    # Tracing may bring symbolic sizes, which have no hash, and looks through caches anyway.
    known = not torch.compiler.is_compiling() and {int}.issuperset(map(type, numels))
    known = known and {int}.issuperset(map(type, counts))
    make = _bodies_of if known else _bodies_of.__wrapped__
    return make(tuple(numels), tuple(counts), value_dtype)


@lru_cache(maxsize=64)
def _bodies_of(numels: tuple[int, ...], counts: tuple[int, ...], value_dtype: torch.dtype) -> Bodies:
    layouts = tuple(
        [Layout.of((value_dtype, k), (index_dtype(n), k)) for n, k in zip(numels, counts, strict=True)]
    )
    ends = list(accumulate([layout.nbytes for layout in layouts], initial=0))
    narrow = all(layout.fields[1].dtype == torch.int32 for layout in layouts)
    pieces = (_pieces(layouts, ends, 0), _pieces(layouts, ends, 1)) if narrow else None
    return Bodies(value_dtype, numels, layouts, tuple(ends[:-1]), ends[-1], pieces)


def _pieces(layouts: Sequence[Layout], starts: Sequence[int], which: int) -> list[int]:
    pieces, end, size = [], 0, 1
    for start, layout in zip(starts[:-1], layouts, strict=True):
        field = layout.fields[which]
        size = field.dtype.itemsize
        pieces += [(start + field.offset - end) // size, field.count]
        end = start + field.end
    return [*pieces, (starts[-1] - end) // size]
