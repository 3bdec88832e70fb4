"""The average of all ranks, from their sum."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_"]


def average_(total: Tensor, world_size: int) -> None:
    """Divides `total` by world_size in place, with the same rounding on every device.

    The divisor is a tensor there: by a number of the host CUDA does not divide, it multiplies by the inverse.
    """
    total.div_(torch.full((), world_size, dtype=total.dtype, device=total.device))
