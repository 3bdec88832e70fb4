"""Compressors that factor a matrix: what they have beside the protocol of `gck.compressor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from gck.compressor import Compressor

__all__ = ["Factored", "is_factored", "shaped"]


class Factored(Compressor, Protocol):
    """A compressor whose payload is two factors, left and right, of which ranks can add up first the one and
    then the other: decoding is linear in right where left is that of all ranks.

    `compress_` is `basis`, `project_`, `orthonormalise_`, `back_project_`, `settle_`. Tensors are fp32, on
    one device and contiguous: acc, a residual, is (numel,); `factors` says the shapes of left, right and
    basis.
    """

    def for_shape(self, shape: Sequence[int]) -> Factored:
        """The same for a tensor of this shape: its rows are what a node's ranks must not cut."""
        ...

    @property
    def columns(self) -> int | None:
        """Elements of a row; None: no shape is known."""
        ...

    def factors(self, numel: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of left, and of right and basis, for so many elements."""
        ...

    def basis(self, numel: int, device: torch.device) -> Tensor:
        """The first one, the same on all ranks."""
        ...

    def next_basis(self, basis: Tensor, right: Tensor) -> Tensor:
        """A new one, of the sum of all ranks' right: the next step starts from there."""
        ...

    def project_(self, grad: Tensor, err: Tensor, basis: Tensor, left: Tensor) -> None:
        """err becomes acc = fp32(grad) + err; left is what acc has of the basis, to be summed."""
        ...

    def orthonormalise_(self, left: Tensor) -> None:
        """What all ranks make of the sum."""
        ...

    def back_project_(self, acc: Tensor, left: Tensor, right: Tensor) -> None:
        """right is what acc has of left."""
        ...

    def product_(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """out, (numel,) fp32, is what left and right decode to."""
        ...

    def settle_(self, acc: Tensor, left: Tensor, right: Tensor, nonfinite: Tensor | None) -> None:
        """acc becomes the residual: less what left and right decode to."""
        ...


def is_factored(compressor: Compressor) -> TypeGuard[Factored]:
    """Whether it has all that `Factored` says; its class has an attribute `factored` which is True."""
    return bool(getattr(compressor, "factored", False))


def shaped(compressor: Compressor, shape: Sequence[int]) -> Compressor:
    """The compressor of a tensor of this shape, for one that looks at it: see `Factored.for_shape`."""
    return compressor.for_shape(shape) if is_factored(compressor) else compressor
