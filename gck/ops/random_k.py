"""Entries at places that a seed says, with and without error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gck import interop
from gck.kernels.common import checks
from gck.kernels.random_k import RandomK
from gck.kernels.topk import check_options, resolve_k
from gck.ops import direct
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.payload import SeededValues
from gck.statistics import Statistics
from gck.values import plain_int, plain_real

__all__ = ["random_k", "random_k_ef_"]


def random_k_ef_(
    grad: Array,
    err: Array,
    ratio: float | None = None,
    *,
    seed: int,
    k: int | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> SeededValues:
    """Sends k entries of acc = grad + err from places that follow from the seed; the rest stays in err.

    Every element is equally likely to be sent. Deterministic; no host synchronisation on CUDA. Runs on
    torch's current stream.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            Entries that would not be finite become 0: what is not finite travels and never stays. Where it
            is not among the entries sent, the one that is nearest by (that of its stratum) is sent as NaN.
        ratio: density in (0, 1]; k = max(1, ceil(ratio * numel)).
        seed: in [-2**63, 2**63): the same on every rank, and another one at every step, such as the step's
            number. With the same one, the same entries are sent again, and others never. A CUDA graph keeps
            the seed that it was captured with.
        k: entries sent, in [1, numel]; instead of ratio.
        value_dtype: float32, bfloat16 or float16 for the values that travel (rounded to nearest even);
            the rounding error stays in err.
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        decay, clip, stats: as for `topk_ef_`.

    Returns:
        SeededValues(values (k,), seed, numel).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Algorithm 1 with the
    random-k operator of Definition 2.1.
    """
    plainly = nonfinite is None and clip is None and stats is None
    if plainly and type(decay) is float and decay == 1 and not is_dynamo_compiling():
        payload: SeededValues | None = direct.maker(RandomK)(seed, grad, err, ratio, k, 0, value_dtype)
        if payload is not None:
            return payload
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("random_k_ef_", ("err",), grad=grad, err=err) as (g, e):
            options: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip, "stats": stats}
            return random_k_ef_(g, e, ratio, seed=seed, k=k, value_dtype=value_dtype, **options)
    ratio, k, seed = plain_real(ratio), plain_int(k), plain_int(seed)
    check_options("random_k_ef_", ratio, k, value_dtype)
    checks.check_seed("random_k_ef_", seed)
    checks.check_grad("random_k_ef_", grad)
    count = resolve_k("random_k_ef_", grad.numel(), ratio, k)
    beta, limit, measured = checks.residual_options("random_k_ef_", grad, decay, clip, stats)
    compressor = _compressor(count, seed, value_dtype, beta)
    compressor.check_inputs("random_k_ef_", grad, err, nonfinite)
    if plain(grad, err, nonfinite, limit, measured):
        body = compress("random_k_ef_", compressor, grad, err, nonfinite, limit, stats=measured)
    else:
        given: Any = (grad, err, count, seed, value_dtype, nonfinite, beta, limit, measured)
        body = torch.ops.gck.random_k_ef_(*given)
    (values,) = compressor.layout(grad.numel()).views(body)
    return SeededValues(values, seed, grad.numel())


def random_k(
    x: Array,
    ratio: float | None = None,
    *,
    seed: int,
    k: int | None = None,
    value_dtype: torch.dtype = torch.float32,
) -> SeededValues:
    """k entries of x from places that follow from the seed, each times numel / k; x is read only.

    Over seeds, the expectation of what is decoded is x, to within the rounding of a product. (With error
    feedback nothing is multiplied: what is not sent is not lost.)

    Arguments, result and errors as for `random_k_ef_`.
    Source: Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed Optimization"
    (NeurIPS 2018), section 3, with equal probabilities.
    """
    if not isinstance(x, Tensor):
        with interop.borrowed("random_k", (), x=x) as (tensor,):
            return random_k(tensor, ratio, seed=seed, k=k, value_dtype=value_dtype)
    ratio, k, seed = plain_real(ratio), plain_int(k), plain_int(seed)
    check_options("random_k", ratio, k, value_dtype)
    checks.check_seed("random_k", seed)
    checks.check_grad("random_k", x, "x")
    count = resolve_k("random_k", x.numel(), ratio, k)
    call = _random_k if plain(x) else torch.ops.gck.random_k
    body = call(x, count, seed, value_dtype)
    (values,) = _compressor(count, seed, value_dtype).layout(x.numel()).views(body)
    return SeededValues(values, seed, x.numel())


def _compressor(k: int, seed: int, value_dtype: torch.dtype, decay: float = 1.0) -> RandomK:
    # Of an empty vector nothing is sent.
    return RandomK(k=max(1, k), seed=seed, value_dtype=value_dtype, decay=decay)


def _random_k_ef(
    grad: Tensor,
    err: Tensor,
    k: int,
    seed: int,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    compressor = _compressor(k, seed, value_dtype, decay)
    return compress("random_k_ef_", compressor, grad, err, nonfinite, clip, stats=stats)


def _random_k(x: Tensor, k: int, seed: int, value_dtype: torch.dtype) -> Tensor:
    return compress("random_k", _compressor(k, seed, value_dtype), x, None, None)


def _fake_random_k_ef(
    grad: Tensor,
    err: Tensor,
    k: int,
    seed: int,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(_compressor(k, 0, value_dtype), grad)


def _fake_random_k(x: Tensor, k: int, seed: int, value_dtype: torch.dtype) -> Tensor:
    return fake_body(_compressor(k, 0, value_dtype), x)


register(
    "random_k_ef_(Tensor grad, Tensor(a!) err, SymInt k, SymInt seed, ScalarType value_dtype,"
    " Tensor(b!)? nonfinite, float decay=1.0, Tensor? clip=None, Tensor(c!)? stats=None) -> Tensor",
    _random_k_ef,
    _fake_random_k_ef,
)
register(
    "random_k(Tensor x, SymInt k, SymInt seed, ScalarType value_dtype) -> Tensor",
    _random_k,
    _fake_random_k,
)
