"""The oracle of sign: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gck.kernels.reference import read_residual


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Returns ((words, scales), new residual, entries cleared because not finite)."""
    n, chunk = grad.numel(), compressor.chunk_size
    acc = grad.reshape(-1).float() + read_residual(compressor, err)
    chunks = -(-n // chunk)
    tree = pad(acc.abs(), (0, chunks * chunk - n)).view(chunks, chunk)
    while tree.shape[1] > 1:
        half = tree.shape[1] // 2
        tree = tree[:, :half] + tree[:, half:]
    valid = (n - chunk * torch.arange(chunks)).clamp(max=chunk).float()
    scales = tree.view(-1) / valid
    scales = torch.where(scales.isnan(), math.nan, scales)  # one NaN, whatever made it
    bits = (acc >= 0).to(torch.int64)
    words = pad(bits, (0, -n % 32)).view(-1, 32) << torch.arange(32)
    fields = (words.sum(1).to(torch.uint32), scales)
    residual = acc - decompress(compressor, fields, n)
    finite = residual.isfinite()
    return fields, torch.where(finite, residual, 0.0), int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, Tensor], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    words, scales = fields
    bits = (words.to(torch.int64).view(-1, 1) >> torch.arange(32)) & 1
    scale = scales.repeat_interleave(compressor.chunk_size)[:numel]
    return torch.where(bits.view(-1)[:numel] == 1, scale, -scale)
