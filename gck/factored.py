"""Compressors that factor a matrix: what they have beside the protocol of `gck.compressor`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from gck.compressor import Compressor

__all__ = ["Factored", "FactoredSteps", "is_factored", "shaped"]


class Factored(Compressor, Protocol):
    """A compressor whose payload is two factors, left and right, of which ranks can add up first the one and
    then the other: decoding is linear in right where left is that of all ranks.

    `compress_` is `basis`, and the steps of `together` but the last two. Hashable, as a frozen dataclass is.
    """

    def __hash__(self) -> int: ...

    def for_shape(self, shape: Sequence[int]) -> Factored:
        """The same for a tensor of this shape: its rows are what a node's ranks must not cut."""
        ...

    @property
    def columns(self) -> int | None:
        """Elements of a row; None: no shape is known."""
        ...

    def basis(self, numel: int, device: torch.device) -> Tensor:
        """The first one, the same on all ranks."""
        ...

    @classmethod
    def together(cls, compressors: Sequence[Any], numels: Sequence[int]) -> FactoredSteps:
        """The steps for tensors of so many elements, at least one each: of compressors of this class, which
        `for_shape` has made of one."""
        ...


class FactoredSteps(Protocol):
    """What a factored all-reduce does one by one, each for all of its tensors.

    Tensors are fp32, on one device and contiguous: accs and errs are (numel,); `factors` says the shapes of
    lefts, rights and bases.
    """

    @property
    def factors(self) -> Sequence[tuple[tuple[int, int], tuple[int, int]]]:
        """Of each tensor the shapes of left, and of right and basis."""
        ...

    def project_(
        self,
        grads: Sequence[Tensor],
        errs: Sequence[Tensor],
        bases: Sequence[Tensor],
        accs: Sequence[Tensor],
        lefts: Sequence[Tensor],
    ) -> None:
        """acc = fp32(grad) + err; left is what acc has of the basis, to be summed. acc may be err."""
        ...

    def orthonormalise_(self, lefts: Sequence[Tensor]) -> None:
        """What all ranks make of the sum."""
        ...

    def back_project_(
        self, accs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
    ) -> None:
        """right is what acc has of left."""
        ...

    def settle_(
        self,
        accs: Sequence[Tensor],
        errs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        cleared: Tensor,
    ) -> None:
        """err becomes the residual: acc less what left and right decode to. cleared, one int64 a tensor, is
        increased by how many were not finite, and are zeros."""
        ...

    def product_(self, outs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        """out, (numel,) fp32, is what left and right decode to."""
        ...

    def next_basis(self, bases: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
        """New ones, of the sums of all ranks' rights: the next step starts from there."""
        ...


def is_factored(compressor: Compressor) -> TypeGuard[Factored]:
    """Whether it has all that `Factored` says; its class has an attribute `factored` which is True."""
    return bool(getattr(compressor, "factored", False))


def shaped(compressor: Compressor, shape: Sequence[int]) -> Compressor:
    """The compressor of a tensor of this shape, for one that looks at it: see `Factored.for_shape`."""
    return _shaped(compressor, tuple(shape)) if is_factored(compressor) else compressor


@lru_cache(maxsize=1024)  # a reduction asks for each of its tensors at every step
def _shaped(compressor: Factored, shape: tuple[int, ...]) -> Factored:
    return compressor.for_shape(shape)
