"""How tensors are described to the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# enum class Dtype in bindings/cpu/types.hpp
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def addresses(bodies: Tensor) -> list[int]:
    """Where each row of (W, nbytes) bodies begins."""
    first, stride = bodies.data_ptr(), bodies.stride(0)
    return [first + rank * stride for rank in range(bodies.shape[0])]


def offsets(fields: Sequence[Tensor]) -> list[int]:
    """How far the second field of a payload, and those behind it, lie from the first one, in bytes."""
    first = fields[0].data_ptr()
    return [field.data_ptr() - first for field in fields[1:]]


def residual_options(
    decay: float, clip: Tensor | None, stats: Tensor | None
) -> tuple[float, int, int] | None:
    """What is asked for beside the compression; None: nothing."""
    if clip is None and stats is None and decay == 1:
        return None
    return (
        decay,
        0 if clip is None else clip.data_ptr(),
        0 if stats is None else stats.data_ptr(),
    )
