"""Codes of few bits, and what they stand for, in torch operations: parts of the peers of packed payloads."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["halving_sum", "of_levels", "pack", "signed", "spread", "two_levels", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """(ceil(n * bits / 8),) uint8 of n integers, little end first; of each the lower `bits` count."""
    each = 8 // bits
    codes = codes.to(torch.int8).view(-1).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % each))
    if each == 1:
        return codes
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return ((codes.view(-1, each) & (2**bits - 1)) << places).sum(1, dtype=torch.uint8)


def unpack(octets: Tensor, bits: int) -> Tensor:
    """uint8 codes of 8, 4, 2 or 1 bits, little end first."""
    if bits == 8:
        return octets
    places = torch.arange(0, 8, bits, device=octets.device, dtype=torch.uint8)
    return ((octets[:, None] >> places) & ((1 << bits) - 1)).view(-1)


def signed(codes: Tensor, bits: int) -> Tensor:
    """fp32 of codes in two's complement."""
    sign = 1 << (bits - 1)
    return codes.to(torch.int16).bitwise_xor_(sign).sub_(sign).float()


def of_levels(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of two bits: a sign (bit 1, 1 for >= 0), and which level (bit 0, 1 for the high one)."""
    level = torch.where((codes & 1) == 1, high, low)
    return torch.where((codes & 2) == 2, level, -level)


def spread(scales: Tensor, chunk_size: int, numel: int) -> Tensor:
    """(numel,): of each element what its chunk has."""
    return scales.repeat_interleave(chunk_size)[:numel]


def two_levels(rows: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(codes as of `of_levels`, (rows, 2) low and high level): the means of the magnitudes below a row's mean
    and of the others, in the order that gck sums in.

    Args:
        slots: power of two, at least the length of a row: what a sum starts from, with zeros behind the row.
    """
    magnitude = rows.abs()
    size = torch.tensor(float(rows.shape[1]), device=rows.device)
    is_high = magnitude >= halving_sum(magnitude, slots) / size
    many = is_high.sum(1, keepdim=True)
    high = halving_sum(magnitude * is_high, slots) / many
    low = halving_sum(magnitude * ~is_high, slots) / (size - many)
    # A group without members takes the level of the other one.
    levels = torch.where(many < size, low, high), torch.where(many > 0, high, low)
    return (rows >= 0).to(torch.uint8).mul_(2).add_(is_high), torch.cat(levels, 1)


def halving_sum(rows: Tensor, slots: int) -> Tensor:
    """(rows, 1): the upper half added to the lower half, until one number is left."""
    tree = torch.nn.functional.pad(rows, (0, slots - rows.shape[1]))
    while tree.shape[1] > 1:
        half = tree.shape[1] // 2
        tree = tree[:, :half] + tree[:, half:]
    return tree
