"""Signs with one scale a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gck import interop
from gck.kernels.common import checks
from gck.kernels.sign import Sign, check_chunk_size
from gck.ops import direct
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.payload import PackedSigns
from gck.statistics import Statistics
from gck.values import plain_int

__all__ = ["sign_ef_"]


def sign_ef_(
    grad: Array,
    err: Array,
    chunk_size: int = 256,
    *,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> PackedSigns:
    """Packs the signs of acc = grad + err with the mean |acc| of each chunk; the rest stays in err.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            A chunk whose scale is not finite travels as such and leaves zeros.
        chunk_size: elements a scale, a power of two in [32, 8192].
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        decay: acc = fp32(grad) + clamp(decay * err, -clip, clip): the residual is multiplied by it as it is
            read; in (0, 1] as fp32 rounds it. What travels is what would if each call ended with
            err = clamp(decay * (acc - decoded), -clip, clip).
        clip: bound of what is added to the gradient: a number above 0, or a one-element fp32 tensor on the
            same device, which nobody waits for, and which counts as 0 where it is not above 0. None: no
            bound. A NaN in err stays NaN.
        stats: a `gck.Statistics` on the same device, overwritten.

    Returns:
        PackedSigns(words (ceil(numel / 32),) uint32, scales (ceil(numel / chunk_size),) fp32, numel,
        chunk_size).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), Algorithm 1.
    """
    plainly = nonfinite is None and clip is None and stats is None
    if plainly and type(decay) is float and decay == 1 and not is_dynamo_compiling():
        payload: PackedSigns | None = direct.maker(Sign)(0, grad, err, chunk_size)
        if payload is not None:
            return payload
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("sign_ef_", ("err",), grad=grad, err=err) as (g, e):
            options: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip, "stats": stats}
            return sign_ef_(g, e, chunk_size, **options)
    chunk_size = plain_int(chunk_size)
    check_chunk_size("sign_ef_", chunk_size)
    beta, limit, values = checks.residual_options("sign_ef_", grad, decay, clip, stats)
    compressor = Sign(chunk_size, beta)
    compressor.check_inputs("sign_ef_", grad, err, nonfinite)
    if plain(grad, err, nonfinite, limit, values):
        body = compress("sign_ef_", compressor, grad, err, nonfinite, limit, stats=values)
    else:
        body = torch.ops.gck.sign_ef_(grad, err, chunk_size, nonfinite, beta, limit, values)
    words, scales = compressor.layout(grad.numel()).views(body)
    return PackedSigns(words, scales, grad.numel(), chunk_size)


def _sign_ef(
    grad: Tensor,
    err: Tensor,
    chunk_size: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return compress("sign_ef_", Sign(chunk_size, decay), grad, err, nonfinite, clip, stats=stats)


def _fake_sign_ef(
    grad: Tensor,
    err: Tensor,
    chunk_size: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(Sign(chunk_size), grad)


register(
    "sign_ef_(Tensor grad, Tensor(a!) err, int chunk_size, Tensor(b!)? nonfinite,"
    " float decay=1.0, Tensor? clip=None, Tensor(c!)? stats=None) -> Tensor",
    _sign_ef,
    _fake_sign_ef,
)
