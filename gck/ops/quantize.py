"""Codes of a few bits with one scale a chunk, with and without error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gck import interop
from gck.kernels.common import checks
from gck.kernels.quantize import Quantize, check_options
from gck.ops import direct
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.payload import Quantized
from gck.statistics import Statistics
from gck.values import plain_int

__all__ = ["quantize", "quantize_ef_"]


def quantize_ef_(
    grad: Array,
    err: Array,
    bits: int = 4,
    chunk_size: int = 256,
    rounding: str = "nearest",
    seed: int | None = None,
    scale: str = "max",
    *,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> Quantized:
    """Rounds acc = grad + err to multiples of each chunk's scale, in few bits; the rest stays in err.

    Deterministic; no host synchronisation on CUDA. Runs on torch's current stream.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            Entries that would not be finite become 0: what is not finite travels and never stays.
        bits: of a code: 8, 4 or 2.
        chunk_size: elements a scale, a power of two in [32, 8192].
        rounding: "nearest" (ties to even), or "stochastic": up or down at random, so that the expectation is
            the element. Element i of the flattened gradient rounds by a function of (seed, i) alone, the same
            on every device and for any number of threads; torch's generators have no part in it.
        seed: of stochastic rounding, which needs one, in [-2**63, 2**63). Give every step, and every rank,
            another one, for example step * world_size + rank: with the same one, errors repeat and do not
            average out. A CUDA graph keeps the seed that it was captured with.
        scale: "max": codes are multiples of the chunk's largest magnitude / (2**(bits - 1) - 1). "mean", for
            2 bits and nearest rounding: a sign and one of two levels, the means of the magnitudes above and
            below the mean.
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        decay: acc = fp32(grad) + clamp(decay * err, -clip, clip): the residual is multiplied by it as it is
            read; in (0, 1] as fp32 rounds it. What travels is what would if each call ended with
            err = clamp(decay * (acc - decoded), -clip, clip).
        clip: bound of what is added to the gradient: a number above 0, or a one-element fp32 tensor on the
            same device, which nobody waits for, and which counts as 0 where it is not above 0. None: no
            bound. A NaN in err stays NaN.
        stats: a `gck.Statistics` on the same device, overwritten.

    Returns:
        Quantized(codes (ceil(numel * bits / 8),) uint8, scales, numel, chunk_size, bits, scale).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Alistarh et al., "QSGD" (NeurIPS 2017), section 3, with the largest magnitude as norm.
    """
    if seed is None and rounding == "nearest":
        seed = 0  # of no account
    plainly = nonfinite is None and clip is None and stats is None
    if plainly and type(decay) is float and decay == 1 and not is_dynamo_compiling():
        payload: Quantized | None = direct.maker(Quantize)(
            seed, grad, err, bits, chunk_size, rounding, 0, scale
        )
        if payload is not None:
            return payload
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("quantize_ef_", ("err",), grad=grad, err=err) as (g, e):
            named: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip, "stats": stats}
            return quantize_ef_(g, e, bits, chunk_size, rounding, seed, scale, **named)
    bits, chunk_size, seed = plain_int(bits), plain_int(chunk_size), plain_int(seed)
    check_options("quantize_ef_", bits, chunk_size, rounding, seed, scale)
    beta, limit, values = checks.residual_options("quantize_ef_", grad, decay, clip, stats)
    compressor = Quantize(bits, chunk_size, rounding, seed, scale, beta)
    compressor.check_inputs("quantize_ef_", grad, err, nonfinite)
    if plain(grad, err, nonfinite, limit, values):
        body = compress("quantize_ef_", compressor, grad, err, nonfinite, limit, stats=values)
    else:
        options = (bits, chunk_size, rounding, seed, scale, nonfinite, beta, limit, values)
        body = torch.ops.gck.quantize_ef_(grad, err, *options)
    return _payload(compressor, body, grad.numel())


def quantize(
    x: Array,
    bits: int = 4,
    chunk_size: int = 256,
    rounding: str = "nearest",
    seed: int | None = None,
    scale: str = "max",
) -> Quantized:
    """x in codes of a few bits, without error feedback; x is read only.

    Arguments, result and errors as for `quantize_ef_`. With stochastic rounding the result is unbiased.
    """
    if not isinstance(x, Tensor):
        with interop.borrowed("quantize", (), x=x) as (tensor,):
            return quantize(tensor, bits, chunk_size, rounding, seed, scale)
    bits, chunk_size, seed = plain_int(bits), plain_int(chunk_size), plain_int(seed)
    check_options("quantize", bits, chunk_size, rounding, seed, scale)
    compressor = Quantize(bits, chunk_size, rounding, seed, scale)
    compressor.check_inputs("quantize", x, None)
    call = _quantize if plain(x) else torch.ops.gck.quantize
    body = call(x, bits, chunk_size, rounding, compressor.key, scale)
    return _payload(compressor, body, x.numel())


def _payload(compressor: Quantize, body: Tensor, numel: int) -> Quantized:
    codes, scales = compressor.layout(numel).views(body)
    if compressor.two_levels:
        scales = scales.view(-1, 2)
    return Quantized(codes, scales, numel, compressor.chunk_size, compressor.bits, compressor.scale)


def _quantize_ef(
    grad: Tensor,
    err: Tensor,
    bits: int,
    chunk_size: int,
    rounding: str,
    seed: int,
    scale: str,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    compressor = Quantize(bits, chunk_size, rounding, seed, scale, decay)
    return compress("quantize_ef_", compressor, grad, err, nonfinite, clip, stats=stats)


def _quantize(x: Tensor, bits: int, chunk_size: int, rounding: str, seed: int, scale: str) -> Tensor:
    return compress("quantize", Quantize(bits, chunk_size, rounding, seed, scale), x, None, None)


def _fake_quantize_ef(
    grad: Tensor,
    err: Tensor,
    bits: int,
    chunk_size: int,
    rounding: str,
    seed: int,
    scale: str,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(Quantize(bits, chunk_size, rounding, scale=scale), grad)


def _fake_quantize(x: Tensor, bits: int, chunk_size: int, rounding: str, seed: int, scale: str) -> Tensor:
    return fake_body(Quantize(bits, chunk_size, rounding, scale=scale), x)


register(
    "quantize_ef_(Tensor grad, Tensor(a!) err, int bits, int chunk_size, str rounding, SymInt seed,"
    " str scale, Tensor(b!)? nonfinite,"
    " float decay=1.0, Tensor? clip=None, Tensor(c!)? stats=None) -> Tensor",
    _quantize_ef,
    _fake_quantize_ef,
)
register(
    "quantize(Tensor x, int bits, int chunk_size, str rounding, SymInt seed, str scale) -> Tensor",
    _quantize,
    _fake_quantize,
)
