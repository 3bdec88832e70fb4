"""The oracle of top-k: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gck.kernels.index_codecs import reference as index_codecs
from gck.kernels.quantize import reference as quantize
from gck.kernels.reference import read_residual


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """Returns (fields, new residual, entries cleared because not finite).

    Fields are values and indices; with a codec or codes: values or codes, scales, and what the codec makes of
    the indices.
    """
    n = grad.numel()
    k = _count(n, compressor)
    acc = grad.reshape(-1).float() + read_residual(compressor, err)
    acc = torch.where(acc.isnan(), math.nan, acc)  # one NaN, whatever made it
    key = (acc.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    chosen = torch.argsort(key, descending=True, stable=True)[:k].sort().values
    indices = chosen.to(torch.int32 if n <= 2**31 - 1 else torch.int64)
    if compressor.value_bits is None:
        values = acc[chosen].to(compressor.value_dtype)
        values = torch.where(values.isnan(), math.nan, values)
        sent, decoded = (values, torch.empty(0)), values.float()
    else:
        sent = quantize.compress(compressor.codes, acc[chosen], torch.tensor(-0.0))[0]
        decoded = quantize.decompress(compressor.codes, sent, k)
    residual = acc.clone()
    residual[chosen] = acc[chosen] - decoded
    finite = residual.isfinite()
    residual = torch.where(finite, residual, 0.0)
    fields = (*sent, *index_codecs.encode(compressor.index_codec, indices, n))
    return (fields[0], indices) if compressor.is_plain else fields, residual, int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, ...], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    chosen = indices_of(compressor, fields, numel)
    if compressor.value_bits is None:
        values = fields[0].float()
    else:
        values = quantize.decompress(compressor.codes, (fields[0], fields[1]), len(chosen))
    dense = torch.zeros(numel, dtype=torch.float32)
    dense[chosen] = values
    return dense


def indices_of(compressor: Any, fields: tuple[Tensor, ...], numel: int) -> Tensor:
    """(k,) int64."""
    if compressor.is_plain:
        return fields[1].long()
    return index_codecs.decode(compressor.index_codec, fields[2:], numel, _count(numel, compressor)).long()


def _count(n: int, compressor: Any) -> int:
    if n == 0:
        return 0
    return int(compressor.k) if compressor.ratio is None else max(1, math.ceil(compressor.ratio * n))
