"""Where the next step starts from, by torch's own operations on a device: it is as small as a factor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drawn_again", "next_basis"]

# How much a basis gets of the numbers of `drawn_again`, beside rows whose largest numbers are about one.
ASTRAY = 2.0**-12


def next_basis(basis: Tensor, right: Tensor) -> Tensor:
    """See `LowRank.next_basis`."""
    peak = right.abs().amax(1, keepdim=True)
    exponent = peak.view(torch.int32) >> 23
    scale = ((253 - exponent).clamp(1, 254) << 23).view(torch.float32)
    return torch.where(peak.isfinite(), right * scale + drawn_again(basis) * ASTRAY, basis)


def drawn_again(basis: Tensor) -> Tensor:
    """Other numbers in [-1, 1) than those of basis, on every device: hashes of their bits and places.

    Source: Appleby, MurmurHash3 (2011), the finalizer of 32 bits.
    """
    places = torch.arange(basis.numel(), device=basis.device).view(basis.shape)
    mixed = (basis.view(torch.int32).long() ^ places * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() * 2.0**-23 - 1
