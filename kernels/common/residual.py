"""A residual as it is read: decayed, and clipped."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import negated

# What a kernel does to a residual, known when it is compiled.
AS_IT_IS, DECAYED, CLIPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ABSENT = tl.constexpr(-1)  # there is none, whatever memory holds


@triton.jit
def read_residual(b_err, decay, p_clip, RESIDUAL: tl.constexpr):
    """clamp(decay * b_err, -clip, clip), in two roundings; a clip that is not above 0 is 0, and NaN stays."""
    if RESIDUAL == ABSENT:
        b_err = tl.full(b_err.shape, -0.0, tl.float32)  # which added to any x is x
    if RESIDUAL > AS_IT_IS:
        b_err = b_err * decay
    if RESIDUAL == CLIPPED:
        clip = tl.load(p_clip)
        clip = tl.where(clip > 0, clip, 0.0)
        b_err = tl.where(tl.abs(b_err) > clip, tl.where(b_err < 0, negated(clip), clip), b_err)
    return b_err


def residual_arguments(decay: float, err: Tensor, clip: Tensor | None) -> tuple[float, Tensor, int]:
    """(decay, clip, RESIDUAL) of a launch; without a clip, any address."""
    kind = CLIPPED if clip is not None else DECAYED if decay != 1 else AS_IT_IS
    return float(decay), err if clip is None else clip, kind.value


def reduction_arguments(job: Any) -> tuple[float, Tensor, int]:
    """The same of a `gck.kernels.common.reduction.Reduction`."""
    if job.err is None:
        return 1.0, job.body, ABSENT.value
    return residual_arguments(job.server.decay, job.err, job.clip)
