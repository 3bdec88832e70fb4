"""The steps of low rank, each for many matrices together: one call on the CPU, few launches on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gck._native import load
from gck.errors import ShapeMismatchError
from gck.kernels.common import checks
from gck.kernels.common.base import backend

__all__ = ["Matrices", "Shape"]

_FP32 = torch.float32  # looked up once


class Shape(NamedTuple):
    """What a vector is taken for: a matrix, row by row, whose last row may be cut short; and the rank of the
    product that is sent for it, at most that of the matrix."""

    rows: int
    columns: int
    rank: int


class Matrices:
    """Matrices that are worked on together; implements `gck.factored.FactoredSteps`.

    Args:
        package: whose cpu and gpu modules hold the kernels.
        numels: elements of each, at least one.
        shapes: of each.
        decay, clip: of residuals, as they are read.

    Attributes:
        factors: of each matrix the shapes of left, and of right and basis.
    """

    def __init__(
        self,
        package: str,
        numels: Sequence[int],
        shapes: Sequence[Shape],
        decay: float = 1.0,
        clip: float | None = None,
    ) -> None:
        self.package, self.numels, self.shapes = package, numels, shapes
        self.decay, self.clip = decay, clip
        self.factors = [((rank, rows), (rank, columns)) for rows, columns, rank in shapes]
        self._vectors = [torch.Size((numel,)) for numel in numels]
        self._lefts = [torch.Size(left) for left, _ in self.factors]
        self._rights = [torch.Size(right) for _, right in self.factors]

    @cached_property
    def native(self) -> Any:
        """What the compiled kernels know of them."""
        shapes = zip(self.numels, self.shapes, strict=True)
        return load().LowRankMatrices([(numel, columns, rank) for numel, (_, columns, rank) in shapes])

    @cached_property
    def alike(self) -> list[list[int]]:
        """Places of matrices that have the same shape."""
        groups: dict[tuple[int, Shape], list[int]] = {}
        for i, key in enumerate(zip(self.numels, self.shapes, strict=True)):
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def project_(
        self,
        grads: Sequence[Tensor],
        errs: Sequence[Tensor],
        bases: Sequence[Tensor],
        accs: Sequence[Tensor],
        lefts: Sequence[Tensor],
    ) -> None:
        function = "LowRank.project_"
        if not checks.acceptable_pairs(grads, errs):
            for grad, err in zip(grads, errs, strict=True):
                checks.check_pair(function, grad, err)
        if [grad.numel() for grad in grads] != [*self.numels]:
            raise ShapeMismatchError(
                f"{function}: gradients must have {[*self.numels]} elements, "
                f"got {[grad.numel() for grad in grads]}"
            )
        self._check(function, lefts, bases=bases, accs=accs, lefts=lefts)
        device = lefts[0].device
        clip = None if self.clip is None else checks.clip_of(self.clip, device)
        self._kernels(device).project_(self, grads, errs, bases, accs, lefts, clip)

    def orthonormalise_(self, lefts: Sequence[Tensor]) -> None:
        self._check("LowRank.orthonormalise_", lefts, lefts=lefts)
        self._kernels(lefts[0].device).orthonormalise_(self, lefts)

    def back_project_(
        self, accs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
    ) -> None:
        self._check("LowRank.back_project_", lefts, accs=accs, lefts=lefts, rights=rights)
        self._kernels(lefts[0].device).back_project_(self, accs, lefts, rights)

    def settle_(
        self,
        accs: Sequence[Tensor],
        errs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        cleared: Tensor,
    ) -> None:
        function = "LowRank.settle_"
        self._check(function, lefts, accs=accs, errs=errs, lefts=lefts, rights=rights)
        checks.check_elements(function, "cleared", cleared, torch.int64, len(lefts), lefts[0], "left")
        self._kernels(lefts[0].device).settle_(self, accs, errs, lefts, rights, cleared)

    def product_(self, outs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        self._check("LowRank.product_", lefts, outs=outs, lefts=lefts, rights=rights)
        self._kernels(lefts[0].device).product_(self, outs, lefts, rights, 1.0, False)

    def next_basis(self, bases: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
        self._check("LowRank.next_basis", rights, bases=bases, rights=rights)
        followings = [torch.empty_like(right) for right in rights]
        self._kernels(rights[0].device).next_basis(self, bases, rights, followings)
        return followings

    def _check(self, function: str, like: Sequence[Tensor], **given: Sequence[Tensor]) -> None:
        """Raises unless all are fp32, contiguous, of the shapes that they must have, and on one device."""
        devices = {tensor.device for tensor in like}
        for name, tensors in given.items():
            shapes = {"lefts": self._lefts, "rights": self._rights, "bases": self._rights}.get(
                name, self._vectors
            )
            # First what is nearly always so, told in a fraction of the time.
            if (
                [tensor.shape for tensor in tensors] == shapes
                and {_FP32}.issuperset([tensor.dtype for tensor in tensors])
                and False not in [tensor.is_contiguous() for tensor in tensors]
                and devices.issuperset([tensor.device for tensor in tensors])
                and len(devices) < 2
            ):
                continue
            what = {"bases": "basis"}.get(name, name[:-1])
            for tensor, shape, other in zip(tensors, shapes, like, strict=True):
                checks.check_elements(function, what, tensor, _FP32, shape.numel(), other)

    def _kernels(self, device: torch.device) -> _Kernels:
        kernels: _Kernels = backend("LowRank", self.package, device)
        return kernels


class _Kernels(Protocol):
    """What `cpu` and `gpu` have."""

    def project_(
        self,
        matrices: Matrices,
        grads: Sequence[Tensor],
        errs: Sequence[Tensor],
        bases: Sequence[Tensor],
        accs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        clip: Tensor | None,
    ) -> None: ...
    def orthonormalise_(self, matrices: Matrices, lefts: Sequence[Tensor]) -> None: ...
    def back_project_(
        self,
        matrices: Matrices,
        accs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
    ) -> None: ...
    def settle_(
        self,
        matrices: Matrices,
        accs: Sequence[Tensor],
        errs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        cleared: Tensor | None,
    ) -> None: ...
    def product_(
        self,
        matrices: Matrices,
        outs: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        alpha: float,
        accumulate: bool,
    ) -> None: ...
    def next_basis(
        self,
        matrices: Matrices,
        bases: Sequence[Tensor],
        rights: Sequence[Tensor],
        followings: Sequence[Tensor],
    ) -> None: ...
