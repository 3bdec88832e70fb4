"""The steps of low rank, each for many matrices together: one call on the CPU, few launches on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gck._native import load
from gck.errors import DeviceMismatchError, LayoutError, ShapeMismatchError
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
        rights = [torch.Size(right) for _, right in self.factors]
        self._shapes = {"rights": rights, "bases": rights}
        self._shapes["lefts"] = [torch.Size(left) for left, _ in self.factors]

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
            for grad, err in zip(grads, errs, strict=False):
                checks.check_pair(function, grad, err)
        self._check(function, grads=grads, errs=errs, bases=bases, accs=accs, lefts=lefts)
        if True in [grad.is_neg() for grad in grads]:
            raise LayoutError(f"{function}: grad is negated lazily; pass grad.resolve_neg()")
        device = lefts[0].device
        clip = None if self.clip is None else checks.clip_of(self.clip, device)
        self._kernels(device).project_(self, grads, errs, bases, accs, lefts, clip)

    def orthonormalise_(self, lefts: Sequence[Tensor]) -> None:
        self._check("LowRank.orthonormalise_", lefts=lefts)
        self._kernels(lefts[0].device).orthonormalise_(self, lefts)

    def back_project_(
        self, accs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
    ) -> None:
        self._check("LowRank.back_project_", accs=accs, lefts=lefts, rights=rights)
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
        self._check(function, accs=accs, errs=errs, lefts=lefts, rights=rights)
        checks.check_elements(function, "cleared", cleared, torch.int64, len(lefts), lefts[0], "left")
        self._kernels(lefts[0].device).settle_(self, accs, errs, lefts, rights, cleared)

    def product_(self, outs: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        self._check("LowRank.product_", outs=outs, lefts=lefts, rights=rights)
        self._kernels(lefts[0].device).product_(self, outs, lefts, rights, 1.0, False)

    def next_basis(self, bases: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
        self._check("LowRank.next_basis", bases=bases, rights=rights)
        followings = [torch.empty_like(right) for right in rights]
        self._kernels(rights[0].device).next_basis(self, bases, rights, followings)
        return followings

    def _check(self, function: str, **given: Sequence[Tensor]) -> None:
        """Raises unless there is one of each for every matrix, contiguous, of the size that it must have, and
        fp32 but for gradients; and all are on one device."""
        devices = set[torch.device]()
        for name, tensors in given.items():
            shapes = self._shapes.get(name, self._vectors)
            if len(tensors) != len(shapes) or not tensors:
                raise ShapeMismatchError(
                    f"{function}: {name} must be {len(shapes)} tensors, at least one, got {len(tensors)}"
                )
            devices.update([tensor.device for tensor in tensors])
            # First what is nearly always so, told in a fraction of the time.
            if name == "grads":  # of any dtype and shape, which were looked at
                fit = [tensor.numel() for tensor in tensors] == [*self.numels]
            else:
                fit = (
                    [tensor.shape for tensor in tensors] == shapes
                    and {_FP32}.issuperset([tensor.dtype for tensor in tensors])
                    and False not in [tensor.is_contiguous() for tensor in tensors]
                )
            if not fit:
                what = {"bases": "basis"}.get(name, name[:-1])
                for tensor, shape in zip(tensors, shapes, strict=True):
                    dtype = tensor.dtype if name == "grads" else _FP32
                    checks.check_elements(function, what, tensor, dtype, shape.numel(), tensor)
        if len(devices) > 1:
            raise DeviceMismatchError(
                f"{function}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
            )

    def _kernels(self, device: torch.device) -> Any:
        return backend("LowRank", self.package, device)
