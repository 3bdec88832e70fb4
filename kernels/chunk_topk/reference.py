"""The oracle of chunk top-k: slow, obvious, plain torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gck.kernels.reference import read_residual

SMALLEST_NORMAL = 2.0**-126


class Entries(NamedTuple):
    """What was selected, (chunks, k) each; slots that a short last chunk leaves empty hold zeros."""

    values: Tensor  # acc, fp32
    indices: Tensor  # int64, relative to the chunk
    live: Tensor  # bool: False for empty slots


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, int]:
    """Returns ((values or codes, scales, indices), new residual, entries cleared because not finite)."""
    n = grad.numel()
    acc = _one_nan(grad.reshape(-1).float() + read_residual(compressor, err))
    entries = _select(compressor, acc)
    values, scales = _encode(compressor.value_bits, entries)
    indices = _pack(entries.indices, 12) if compressor.packs_indices else entries.indices.to(torch.uint16)
    fields = (values.reshape(-1), scales.reshape(-1), indices.reshape(-1))
    residual = acc - decompress(compressor, fields, n)
    finite = residual.isfinite()
    return fields, torch.where(finite, residual, 0.0), int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, Tensor, Tensor], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    k, size = compressor.k, compressor.chunk_size
    chunks = -(-numel // size)
    values, scales, indices = (
        field.reshape(-1)[: chunks * count].view(chunks, count)
        for field, count in zip(fields, compressor.row, strict=True)
    )
    decoded = _decode(compressor.value_bits, values, scales, k)
    local = _unpack(indices, 12, k) if compressor.packs_indices else indices.to(torch.int64)
    dense = torch.zeros(chunks * size)
    live = torch.arange(k) < (numel - size * torch.arange(chunks))[:, None]
    dense[(size * torch.arange(chunks)[:, None] + local)[live]] = decoded[live]
    return dense[:numel]


def _select(compressor: Any, acc: Tensor) -> Entries:
    k, size = compressor.k, compressor.chunk_size
    chunks = -(-acc.numel() // size)
    padded = pad(acc, (0, chunks * size - acc.numel())).view(chunks, size)
    inside = (torch.arange(chunks * size) < acc.numel()).view(chunks, size)
    key = torch.where(inside, (padded.view(torch.int32) & 0x7FFFFFFF).to(torch.int64), -1)
    order = torch.argsort(key, dim=1, descending=True, stable=True)[:, :k]
    live = inside.gather(1, order)
    # Empty slots come last of all, and hold zeros.
    order = torch.where(live, order, size).sort(dim=1).values
    live = order < size
    indices = torch.where(live, order, 0)
    return Entries(torch.where(live, padded.gather(1, indices), 0.0), indices, live)


def _encode(bits: int, entries: Entries) -> tuple[Tensor, Tensor]:
    values, live = entries.values, entries.live
    none = torch.empty(len(values), 0)
    if bits == 32:
        return values, none
    if bits == 16:
        return _one_nan(values.to(torch.bfloat16)), none
    if bits == 2:
        low, high, is_high = _levels(entries)
        codes = ((values >= 0).long() << 1) | is_high.long()
        return _pack(torch.where(live, codes, 0), 2), torch.stack([low, high], 1)
    qmax = 2 ** (bits - 1) - 1
    largest = values.abs().amax(1)  # NaN where there is one
    scales = _one_nan(largest / qmax)
    scales = torch.where(scales < SMALLEST_NORMAL, 0.0, scales)
    inverse = 1 / torch.where(scales > 0, scales, 1.0)
    codes = (values * inverse[:, None]).round().clamp(-qmax, qmax)
    codes = torch.where(scales[:, None] > 0, codes, 0.0)
    extreme = torch.where(values >= 0, qmax, -qmax).float()
    codes = torch.where(scales.isfinite()[:, None], codes, extreme)
    return _pack(torch.where(live, codes.long(), 0) & (2**bits - 1), bits), scales[:, None]


def _levels(entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """(low level, high level, which entries are at the high one) of each chunk."""
    magnitude, live = entries.values.abs(), entries.live
    mean = _mean(magnitude, live)
    is_high = live & (magnitude >= mean[:, None])
    is_low = live & ~is_high
    high, low = _mean(magnitude, is_high), _mean(magnitude, is_low)
    # A group without members takes the level of the other one.
    return torch.where(is_low.any(1), low, high), torch.where(is_high.any(1), high, low), is_high


def _mean(magnitude: Tensor, chosen: Tensor) -> Tensor:
    """Mean of each row's chosen entries, summed as a halving tree over a power of two of slots."""
    k = magnitude.shape[1]
    tree = pad(torch.where(chosen, magnitude, 0.0), (0, 2 ** math.ceil(math.log2(k)) - k))
    while tree.shape[1] > 1:
        half = tree.shape[1] // 2
        tree = tree[:, :half] + tree[:, half:]
    return _one_nan(tree[:, 0] / chosen.sum(1))


def _decode(bits: int, values: Tensor, scales: Tensor, k: int) -> Tensor:
    if bits >= 16:
        return values.float()
    codes = _unpack(values, bits, k)
    if bits == 2:
        level = torch.where((codes & 1) == 1, scales[:, 1:], scales[:, :1])
        return torch.where((codes & 2) == 2, level, -level)
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return signed.float() * scales


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, k) non-negative int64 to (rows, ceil(k * bits / 8)) uint8, little end first."""
    rows, k = codes.shape
    stream = ((codes[:, :, None] >> torch.arange(bits)) & 1).reshape(rows, k * bits)
    octets = pad(stream, (0, -k * bits % 8)).reshape(rows, -(-k * bits // 8), 8)
    return (octets << torch.arange(8)).sum(2).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The (rows, k) int64 codes of `_pack`."""
    rows = len(packed)
    stream = ((packed.to(torch.int64)[:, :, None] >> torch.arange(8)) & 1).reshape(rows, packed.shape[1] * 8)
    return (stream[:, : k * bits].reshape(rows, k, bits) << torch.arange(bits)).sum(2)


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), math.nan, x)
