"""Statistics of what is compressed elsewhere: in pieces, in rows, or by a compressor of the user's own.

A compressor takes them in the pass that it makes anyway, see `gck.Statistics`. What cannot ask it for them
reads once before, and the residual once after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import Compressor
from gck.kernels.common.checks import clip_of
from gck.kernels.common.native import DTYPE_CODE, residual_options
from gck.statistics import FIELDS

__all__ = ["Host", "Measurement"]


class Measurement:
    """Statistics of one gradient with its residual, begun before they are compressed.

    Args:
        compressor: whose decay and clip, if it has any, say how the residual is read.
        grad: (numel,) fp32, bf16 or fp16, contiguous; numel at least 1.
        err: (numel,) fp32 on the same device, contiguous.
    """

    def __init__(self, compressor: Compressor, grad: Tensor, err: Tensor) -> None:
        decay, clip = getattr(compressor, "decay", 1.0), getattr(compressor, "clip", None)
        limit = None if clip is None else clip_of(clip, grad.device)
        self._kernels: Any = Host if grad.device.type == "cpu" else _device()
        self._sums: Tensor = self._kernels.measure_acc(grad, err, decay, limit)

    def finish(self, err: Tensor, selected: int) -> Tensor:
        """(5,) fp64 values of `gck.Statistics`: `err` is what was left, `selected` how many entries went."""
        values: Tensor = self._kernels.measure_err(self._sums, err, selected)
        return values


class Host:
    """What `gck.kernels.common.gpu_statistics` is for devices."""

    @staticmethod
    def measure_acc(grad: Tensor, err: Tensor, decay: float, clip: Tensor | None) -> Tensor:
        return _measured(grad.data_ptr(), DTYPE_CODE[grad.dtype], err, decay, clip)

    @staticmethod
    def measure_err(sums: Tensor, err: Tensor, selected: int) -> Tensor:
        sums[2] = _measured(0, 0, err, 1.0, None)[2]
        sums[4] = selected
        return sums


def _measured(grad: int, dtype: int, err: Tensor, decay: float, clip: Tensor | None) -> Tensor:
    values = torch.zeros(len(FIELDS), dtype=torch.float64)
    options = residual_options(decay, clip, values)
    load().residual_measure(grad, dtype, err.data_ptr(), err.numel(), num_threads(), options)
    return values


def _device() -> Any:
    from gck.kernels.common import gpu_statistics

    return gpu_statistics
