"""The oracle of random-k: slow, obvious, plain torch; indices by Python's own integers."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def compress(compressor: Any, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor], Tensor, int]:
    """Returns ((values,), new residual, entries cleared because not finite)."""
    n = grad.numel()
    k = _count(n, compressor)
    acc = grad.reshape(-1).float() + err.reshape(-1)
    acc = torch.where(acc.isnan(), math.nan, acc)  # one NaN, whatever made it
    scaled = acc * torch.tensor(n / k if compressor.rescale else 1.0, dtype=torch.float32)
    # Position p of the ring is element (p + rotation) % n of the vector; strata are runs of the ring.
    rotation, chosen = ring(compressor.seed, n, k)
    lengths = torch.tensor([n // k + (i < n % k) for i in range(k)])
    stratum = torch.arange(k).repeat_interleave(lengths).roll(rotation)
    spoilt = torch.zeros(k).index_add(0, stratum, (~acc.isfinite()).float()) > 0
    sent = scaled[(torch.tensor(chosen) + rotation) % n].to(compressor.value_dtype)
    sent = torch.where(sent.isnan() | (spoilt & sent.isfinite()), math.nan, sent)
    # In the order of the vector, which starts somewhere in the ring.
    order = sorted(range(k), key=lambda i: (chosen[i] + rotation) % n)
    fields = (sent[torch.tensor(order)],)
    residual = acc - decompress(compressor, fields, n)
    finite = residual.isfinite()
    return fields, torch.where(finite, residual, 0.0), int((~finite).sum())


def decompress(compressor: Any, fields: tuple[Tensor, ...], numel: int) -> Tensor:
    """The dense fp32 vector that the receiver sees."""
    (values,) = fields
    dense = torch.zeros(numel, dtype=torch.float32)
    dense[torch.tensor(indices(compressor.seed, numel, values.numel()))] = values.float()
    return dense


def indices(seed: int, numel: int, k: int) -> list[int]:
    """The k indices, ascending."""
    rotation, chosen = ring(seed, numel, k)
    return sorted((position + rotation) % numel for position in chosen)


@lru_cache(maxsize=64)
def ring(seed: int, numel: int, k: int) -> tuple[int, list[int]]:
    """(rotation, the position on the ring that is chosen in each of the k strata)."""
    rotation = number(seed, 2**64 - 2) * numel >> 64
    chosen, begin = [], 0
    for i in range(k):
        length = numel // k + (i < numel % k)
        chosen.append(begin + (number(seed, i) * length >> 64))
        begin += length
    return rotation, chosen


def number(seed: int, i: int) -> int:
    """The i-th 64-bit number of a seed: one half of the 128 bits that Philox4x32-10 makes of i // 2."""
    words = philox([i // 2 & 0xFFFFFFFF, i // 2 >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    return words[i % 2 * 2] | words[i % 2 * 2 + 1] << 32


def philox(x: list[int], key: list[int]) -> list[int]:
    """The four words that Philox4x32-10 makes of the four words of a counter."""
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            second >> 32 ^ x[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ x[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return x


def _count(n: int, compressor: Any) -> int:
    return int(compressor.k) if compressor.ratio is None else max(1, math.ceil(compressor.ratio * n))
