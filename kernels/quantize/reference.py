"""The oracle of quantize: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gck.kernels.reference import read_residual

SMALLEST_NORMAL = 2.0**-126


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Returns ((packed codes, scales), new residual, entries cleared because not finite)."""
    n, size = grad.numel(), compressor.chunk_size
    chunks = -(-n // size)
    acc = _one_nan(grad.reshape(-1).float() + read_residual(compressor, err))
    rows = pad(acc, (0, chunks * size - n)).view(chunks, size)
    live = (torch.arange(chunks * size) < n).view(chunks, size)
    if compressor.scale == "mean":
        codes, scales = _two_levels(rows, live)
    else:
        codes, scales = _scaled(compressor, rows)
    fields = (_pack(codes.reshape(-1)[:n], compressor.bits), scales.reshape(-1))
    residual = acc - decompress(compressor, fields, n)
    finite = residual.isfinite()
    return fields, torch.where(finite, residual, 0.0), int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, Tensor], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    bits = compressor.bits
    codes = _unpack(fields[0], bits)[:numel]
    scales = fields[1].reshape(-1, 2 if compressor.scale == "mean" else 1)
    scales = scales.repeat_interleave(compressor.chunk_size, 0)[:numel]
    if compressor.scale == "mean":
        level = torch.where((codes & 1) == 1, scales[:, 1], scales[:, 0])
        return torch.where((codes & 2) == 2, level, -level)
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return signed.float() * scales[:, 0]


def uniform(seed: int, numel: int, first: int = 0) -> Tensor:
    """(numel,) fp32, multiples of 2**-24 in [0, 1): the upper 24 bits of words that are turned.

    Of the elements from index `first` on, a multiple of 32. Each 64 share the sixteen words that
    Philox4x32-10 makes of four counters: the first sixteen elements take them as they are, the next ones
    turned left by one byte, by two, by three.
    """
    skipped = first % 64
    sixties = -(-(skipped + numel) // 64)
    counter = first // 64 * 4 + torch.arange(sixties * 4)
    zero = torch.zeros_like(counter)
    counters = [counter & 0xFFFFFFFF, counter >> 32, zero, zero]
    words = philox(counters, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF).view(-1, 1, 16)
    turn = torch.arange(4).view(1, 4, 1) * 8
    turned = words << turn & 0xFFFFFFFF | words >> 32 - turn
    return (turned.reshape(-1)[skipped : skipped + numel] >> 8).float() * 2.0**-24


def philox(x: list[Tensor], key_0: int, key_1: int) -> Tensor:
    """(..., 4) int64, the words of Philox4x32-10 for counters of the four words x."""
    for _ in range(10):
        high_0, low_0 = _product(0xD2511F53, x[0])
        high_2, low_2 = _product(0xCD9E8D57, x[2])
        x = [high_2 ^ x[1] ^ key_0, low_2, high_0 ^ x[3] ^ key_1, low_0]
        key_0, key_1 = key_0 + 0x9E3779B9 & 0xFFFFFFFF, key_1 + 0xBB67AE85 & 0xFFFFFFFF
    return torch.stack(x, -1)


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of factor * x, by halves, because int64 holds no 64 bits without sign."""
    upper = x * (factor >> 16) + (x * (factor & 0xFFFF) >> 16)
    return upper >> 16, (x * factor) & 0xFFFFFFFF


def _scaled(compressor: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    qmax = 2 ** (compressor.bits - 1) - 1
    scales = _one_nan(rows.abs().amax(1) / qmax)  # NaN where there is one
    scales = torch.where(scales < SMALLEST_NORMAL, 0.0, scales)[:, None]
    inverse = 1 / torch.where(scales > 0, scales, 1.0)
    codes = rows * inverse
    if compressor.rounding == "stochastic":
        whole = codes.abs().floor()
        up = uniform(compressor.seed, rows.numel(), compressor.first).view_as(rows) < codes.abs() - whole
        codes = torch.where(rows >= 0, 1.0, -1.0) * (whole + up)
    else:
        codes = codes.round()
    codes = torch.where(scales > 0, codes.clamp(-qmax, qmax), 0.0)
    extreme = torch.where(rows >= 0, qmax, -qmax).float()
    return torch.where(scales.isfinite(), codes, extreme).long(), scales


def _two_levels(rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = rows.abs()
    is_high = live & (magnitude >= _mean(magnitude, live))
    is_low = live & ~is_high
    high, low = _mean(magnitude, is_high), _mean(magnitude, is_low)
    # A group without members takes the level of the other one.
    some_low, some_high = is_low.any(1, keepdim=True), is_high.any(1, keepdim=True)
    levels = torch.where(some_low, low, high), torch.where(some_high, high, low)
    return (rows >= 0).long() * 2 + is_high.long(), torch.cat(levels, 1)


def _mean(magnitude: Tensor, chosen: Tensor) -> Tensor:
    """(chunks, 1): mean of each row's chosen elements, summed as a halving tree."""
    tree = torch.where(chosen, magnitude, 0.0)
    while tree.shape[1] > 1:
        half = tree.shape[1] // 2
        tree = tree[:, :half] + tree[:, half:]
    return _one_nan(tree / chosen.sum(1, keepdim=True))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) int64 to ceil(n * bits / 8) bytes, little end first: element j at bits [j * bits, ...)."""
    each = 8 // bits
    codes = pad(codes & (2**bits - 1), (0, -len(codes) % each)).view(-1, each)
    return (codes << bits * torch.arange(each)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The non-negative codes of `_pack`."""
    shifted = packed.to(torch.int64)[:, None] >> bits * torch.arange(8 // bits)
    return (shifted & ((1 << bits) - 1)).view(-1)


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), math.nan, x)
