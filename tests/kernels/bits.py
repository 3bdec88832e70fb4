"""Vectors of random bits."""

from __future__ import annotations

import torch
from torch import Tensor


def bit_patterns(n: int, seed: int) -> Tensor:
    """fp32 of random bits: every exponent, denormals, and NaNs of many payloads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)
