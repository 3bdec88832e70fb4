"""Residuals times a factor, such as that of the scale of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float

import torch
from torch import Tensor

from gck.error_feedback.checks import is_finite
from gck.errors import ArgumentError, LayoutError
from gck.values import shown
from gck.wire import has_memory

__all__ = ["check_scaled", "check_writable", "multiply_"]

PIECE = 1 << 18  # elements that are fp64 at a time: a near cache has them


def multiply_(residual: Tensor, factor: float) -> None:
    """Each product is made in fp64 and rounded to fp32: the factor may be one that fp32 does not have."""
    residual = residual.detach()
    if c_float(factor).value == factor:  # then fp64 would give the same bits
        residual.mul_(factor)
        return
    for piece in residual.split(PIECE):
        piece.copy_(piece.double().mul_(factor))


def check_writable(function: str, residuals: Mapping[str, Tensor | None]) -> None:
    """Raises LayoutError unless `multiply_` can write to all of them."""
    for name, residual in residuals.items():
        if residual is not None and not (residual.is_contiguous() and has_memory(residual)):
            raise LayoutError(f"{function}: the {name} has no memory of its own, got {shown(residual)}")


def check_scaled(function: str, residuals: Mapping[str, Tensor | None], factor: float) -> None:
    """Raises ArgumentError where `multiply_` would leave something that is not finite.

    Waits for the device, unless `factor` is at most 1: nothing grows then.

    Args:
        residuals: by what errors call them.
    """
    for name, residual in residuals.items() if factor > 1 else ():
        if residual is not None and residual.numel():
            extremes = torch.stack(torch.aminmax(residual))
            multiply_(extremes, factor)
            if not is_finite(extremes):
                raise ArgumentError(
                    f"{function}: the {name} would not be finite, times {factor}; nothing was changed"
                )
