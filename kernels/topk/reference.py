"""The oracle of top-k: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gck.kernels.reference import read_residual


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Returns ((values, indices), new residual, entries cleared because not finite)."""
    n = grad.numel()
    k = _count(n, compressor)
    acc = grad.reshape(-1).float() + read_residual(compressor, err)
    acc = torch.where(acc.isnan(), math.nan, acc)  # one NaN, whatever made it
    key = (acc.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    indices = torch.argsort(key, descending=True, stable=True)[:k].sort().values
    values = acc[indices].to(compressor.value_dtype)
    values = torch.where(values.isnan(), math.nan, values)
    residual = acc.clone()
    residual[indices] = acc[indices] - values.float()
    finite = residual.isfinite()
    residual = torch.where(finite, residual, 0.0)
    index_dtype = torch.int32 if n <= 2**31 - 1 else torch.int64
    return (values, indices.to(index_dtype)), residual, int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, Tensor], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    values, indices = fields
    dense = torch.zeros(numel, dtype=torch.float32)
    dense[indices.to(torch.int64)] = values.float()
    return dense


def _count(n: int, compressor: Any) -> int:
    if n == 0:
        return 0
    return int(compressor.k) if compressor.ratio is None else max(1, math.ceil(compressor.ratio * n))
