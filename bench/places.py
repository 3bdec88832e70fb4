"""Where the entries of a payload lie, in torch operations: of indices by a codec, and of a seed."""

from __future__ import annotations

import torch
from torch import Tensor

import gck
from bench.codes import unpack
from gck.coded_layout import BLOCK, elias_fano_bits
from gck.kernels.quantize.reference import philox

__all__ = ["places_of_codec", "places_of_seed"]

WORD = 0xFFFFFFFF


def places_of_codec(payload: gck.CodedSparse) -> Tensor:
    """(k,) int64: docs/index_codecs.md."""
    k, low, high = payload.k, payload.index_low, payload.index_high
    if payload.index_codec == "int32":
        return low.long()
    each = torch.arange(k, device=low.device)
    if payload.index_codec == "block16":
        blocks = torch.searchsorted(high.long(), each, right=True)
        return blocks * BLOCK + (low.view(torch.int16).long() & 0xFFFF)
    bits, _ = elias_fano_bits(payload.numel, k)
    lower = unpack(low, 1)[: k * bits].view(k, bits).long() << torch.arange(bits, device=low.device)
    upper = unpack(high, 1).nonzero().view(-1) - each
    return (upper << bits) + lower.sum(1)


def places_of_seed(seed: int, numel: int, k: int, device: torch.device) -> Tensor:
    """(k,) int64, ascending, of numel < 2**31 elements: docs/kernels/random_k.md."""
    stratum = torch.arange(k, device=device)
    length, longer = divmod(numel, k)
    numbers = _numbers(seed, torch.arange(-(-k // 2), device=device))[:k]
    chosen = stratum * length + stratum.clamp(max=longer) + _share(numbers, length + (stratum < longer))
    turn = _share(_numbers(seed, torch.tensor([2**63 - 1], device=device))[:1], numel)
    return ((chosen + turn) % numel).sort().values


def _numbers(seed: int, counters: Tensor) -> Tensor:
    """(2 * counters, 2) int64: the lower and the upper 32 bits of the two numbers of each counter."""
    zero = torch.zeros_like(counters)
    words = philox([counters & WORD, counters >> 32, zero, zero], seed & WORD, seed >> 32 & WORD)
    return words.view(-1, 2)


def _share(numbers: Tensor, length: Tensor | int) -> Tensor:
    """number * length // 2**64."""
    low, high = numbers[:, 0], numbers[:, 1]
    return (high * length + (low * length >> 32)) >> 32
