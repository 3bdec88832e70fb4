"""Low rank: a gradient, taken for a matrix, as the product of two thin ones.

Source: Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization" (NeurIPS 2019), Algorithm 1: one step of a power iteration. How sums are ordered, and how rows
are made orthonormal: docs/kernels/low_rank.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor, backend
from gck.kernels.low_rank.matrices import Matrices, Shape
from gck.payload import MOST_COLUMNS, MOST_RANK
from gck.values import make_plain, shown
from gck.wire import Layout

__all__ = ["LowRank", "Shape", "check_options"]

# Rows of a vector that nobody gave a shape begin at multiples of so many elements, where it is large.
ALIGNED = 64


@dataclass(frozen=True)
class LowRank(KernelCompressor):
    """Sends two factors of few rows, whose product is the part of a matrix that one of them spans.

    acc is a matrix M. left = basis M^T, its rows made orthonormal; right = left M; decoded is left^T right,
    the projection of M on what left spans: what remains is never longer than M.

    All-reduces take the last step's right for a basis, which makes them power iterations, and sum left and
    right over ranks (`gck.all_reduce_`, "factored"). Alone, each call draws a basis by the seed: take another
    one at every step, or what is orthogonal to it is never sent.

    Attributes:
        rank: rows of left and right, in [1, 64]; fewer where the matrix has fewer rows or columns.
        columns: of the matrix. None: of a tensor of two or more dimensions, all but the first one together;
            of a vector, about its square root.
        seed: of the first basis, in [-2**63, 2**63), the same on all ranks. No generator of torch is read.
        decay, clip: of residuals, as they are read; see `gck.low_rank_ef_`.

    Raises:
        ArgumentError: an option is out of range.
        DtypeError: an option is of the wrong type.
    """

    rank: int = 4
    columns: int | None = None
    seed: int = field(default=0, metadata={"of_a_step": True})
    decay: float = 1.0
    clip: float | None = None

    name: ClassVar[str] = "low_rank"
    package: ClassVar[str] = __name__
    factored: ClassVar[bool] = True  # see `gck.factored.is_factored`

    def __post_init__(self) -> None:
        make_plain(self, ("rank", "columns", "seed"), ("decay", "clip"))
        check_options("LowRank", self.rank, self.columns)
        checks.check_seed("LowRank", self.seed)
        checks.check_residual("LowRank", self.decay, self.clip)

    @property
    def shard_unit(self) -> int | None:
        return None

    def shape(self, numel: int) -> Shape:
        """What a vector of `numel` elements is taken for."""
        columns = self.columns
        if columns is None:
            columns = math.ceil(math.sqrt(numel))  # which torch.compile can trace; exact below 2**52
            columns = columns if columns <= ALIGNED else -(-columns // ALIGNED) * ALIGNED
        columns = min(columns, numel)
        rows = -(-numel // columns) if columns else 0
        return Shape(rows, columns, min(self.rank, rows, columns))

    def for_shape(self, shape: Sequence[int]) -> LowRank:
        """The compressor of a tensor of this shape: its `columns` are given."""
        return replace(self, columns=self.columns_for(shape))

    def columns_for(self, shape: Sequence[int]) -> int:
        """Columns of the matrix that a tensor of this shape is taken for; at least one, of nothing, too."""
        numel = math.prod(shape)
        columns = self.shape(numel).columns
        if self.columns is None and len(shape) > 1 and numel:
            columns = min(numel // shape[0], MOST_COLUMNS)
        return max(1, columns)

    def layout(self, numel: int) -> Layout:
        rows, columns, rank = self.shape(numel)
        return Layout.of((torch.float32, rank * rows), (torch.float32, rank * columns))

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> LowRank:
        """The compressor that decodes a payload with these fields; options: columns."""
        return cls(rank=min(MOST_RANK, max(1, fields[0].shape[0])), columns=max(1, options[0]))

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        rows, columns, rank = self.shape(numel)
        for name, tensor, length in zip(("left", "right"), fields, (rows, columns), strict=True):
            if tensor.dtype != torch.float32:
                raise DtypeError(f"{function}: payload {name} must be float32, got {tensor.dtype}")
            flat = tensor.dim() == 1
            if tensor.numel() != rank * length or not (flat or tuple(tensor.shape) == (rank, length)):
                raise CorruptPayloadError(
                    f"{function}: payload {name} of {tuple(tensor.shape)} does not fit {numel} elements in "
                    f"{rows} rows of {columns}, of rank {rank}"
                )

    # What the "factored" all-reduce does one by one, see `gck.factored.Factored`; `compress_` is all of it,
    # with a basis by the seed.

    def basis(self, numel: int, device: torch.device) -> Tensor:
        """The first one, (rank, columns) fp32: numbers in [-1, 1), by the seed."""
        _, columns, rank = self.shape(numel)
        basis = torch.empty((rank, columns), dtype=torch.float32, device=device)
        if numel:
            backend("LowRank", self.package, device).basis_(self, basis)
        return basis

    @classmethod
    def together(cls, compressors: Sequence[LowRank], numels: Sequence[int]) -> Matrices:
        """The steps for matrices of so many elements, at least one each, of a compressor each."""
        return _together(tuple(compressors), tuple(numels))

    def alone(self, numel: int) -> Matrices:
        """The same for one."""
        return Matrices(self.package, (numel,), (self.shape(numel),), self.decay, self.clip)


@lru_cache(maxsize=256)
def _together(compressors: tuple[LowRank, ...], numels: tuple[int, ...]) -> Matrices:
    first = compressors[0]
    if any(numel < 1 for numel in numels):
        raise ArgumentError(f"LowRank.together: numels must be at least 1, got {list(numels)}")
    if any((each.decay, each.clip) != (first.decay, first.clip) for each in compressors):
        raise ArgumentError("LowRank.together: decay and clip must be the same for all matrices")
    shapes = tuple(each.shape(numel) for each, numel in zip(compressors, numels, strict=True))
    return Matrices(first.package, numels, shapes, first.decay, first.clip)


def check_options(function: str, rank: object, columns: object) -> None:
    """Raises DtypeError or ArgumentError unless they are what `LowRank` takes."""
    for name, value, most in (("rank", rank, MOST_RANK), ("columns", columns, MOST_COLUMNS)):
        if value is None and name == "columns":
            continue
        # Not `int | torch.SymInt`, which torch.compile of torch 2.6 does not take.
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
        if not 1 <= value <= most:
            raise ArgumentError(f"{function}: {name} must be in [1, {most}], got {value}")
