"""What every Triton launch of this package shares."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

import torch
import triton
from torch import Tensor

# Before, tl.histogram takes no mask and a division flushes denormals.
OLDEST_TRITON = (3, 6)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
    raise ImportError(f"gck needs Triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}, found {triton.__version__}")

# Contraction of a * b + c into one rounding would change bytes, and its default differs by version.
EXACT = {"enable_fp_fusion": False}

# Two programs of 8 warps fit on a processor with that many registers a thread, AMD's included.
TOGETHER_PER_PROCESSOR = 2
TOGETHER_REGISTERS = 128
# The device then starts all programs or none: some of them, waiting for the rest, could keep out a collective
# on which the rest of another rank waits.
TOGETHER_LAUNCH = {"launch_cooperative_grid": True}

# Without a GPU the kernels run in Triton's interpreter, one program after another: few, but several.
INTERPRETED_PROGRAMS = 5


def registers(most: int | None) -> dict[str, int]:
    """The launch option that keeps a thread's registers to so many, where the compiler has one."""
    return {} if torch.version.hip or most is None else {"maxnreg": most}


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """The context to launch in: Triton uses the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    import numpy

    # The interpreter computes with numpy, which warns of what IEEE arithmetic defines: inf - inf.
    return numpy.errstate(all="ignore")


def most_together(tensor: Tensor) -> int | None:
    """How many programs of 8 warps, of at most TOGETHER_REGISTERS and launched with TOGETHER_LAUNCH, may wait
    for each other. None: programs run one after another."""
    return TOGETHER_PER_PROCESSOR * _processors(tensor.device) if tensor.device.type == "cuda" else None


def looping(tensor: Tensor, each: int) -> int:
    """How many programs share work that they loop over: `each` a processor, of as many as fit on it."""
    return each * _processors(tensor.device) if tensor.device.type == "cuda" else INTERPRETED_PROGRAMS


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
