"""The oracle of what all compressors with error feedback share: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 512


def read_residual(compressor: Any, err: Tensor, clip: Tensor | None = None) -> Tensor:
    """(n,) fp32: what `compressor` adds to a gradient, clamp(decay * err, -clip, clip).

    A clip that is not above 0 is 0; NaN stays NaN, and zeros keep their sign.
    """
    residual = err.reshape(-1) * torch.tensor(compressor.decay, dtype=torch.float32)
    if clip is None:
        if compressor.clip is None:
            return residual
        above_all = compressor.clip > torch.finfo(torch.float32).max
        clip = torch.tensor(math.inf if above_all else 1.0 * compressor.clip, dtype=torch.float32)
    limit = torch.where(clip > 0, clip, 0.0)
    return torch.where(residual.abs() > limit, torch.copysign(limit, residual), residual)


def statistics(acc: Tensor, err: Tensor, selected: int, sent: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(5,) float64; see `gck.Statistics`.

    Args:
        acc: what was compressed.
        err: what was left of it.
        selected: entries of the payload.
        sent: (values, indices) of a payload of single entries: err_sq is what these left of acc_sq.
    """
    finite = torch.where(acc.isfinite(), acc, 0.0).double()
    acc_sq = tree(finite.square())
    if sent is None:
        err_sq = tree(err.double().square())
    else:
        values, indices = sent
        left = err[indices.long()].double()
        both = (values.double() + left).square() - left.square()
        err_sq = (acc_sq - tree(torch.where(values.isfinite(), both, 0.0))).clamp(min=0.0)
    nonfinite = (~acc.isfinite()).sum().double()
    return torch.stack(
        [tree(finite.abs()), acc_sq, err_sq, nonfinite, torch.tensor(float(selected), dtype=torch.float64)]
    )


def tree(x: Tensor) -> Tensor:
    """The sum of (n,) float64, n > 0: of each BLOCK numbers as a halving tree, then of those sums."""
    while True:
        rows = pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        x = rows[:, 0]
        if len(x) == 1:
            return x[0]
