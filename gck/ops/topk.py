"""Top-k with and without error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gck import interop
from gck.errors import ArgumentError
from gck.kernels.common import checks
from gck.kernels.topk import TopK, check_options, resolve_k
from gck.ops import direct
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.ops.topk_list import topk_ef_list_
from gck.payload import SparseGrad
from gck.statistics import Statistics
from gck.values import check_flags, plain_int, plain_real, shown
from gck.wire import Layout

__all__ = ["topk", "topk_ef_"]


@overload
def topk_ef_(
    grad: Array,
    err: Array,
    ratio: float | None = None,
    *,
    k: int | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    hint: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> SparseGrad: ...


@overload
def topk_ef_(
    grad: Sequence[Array],
    err: Sequence[Array],
    ratio: float | None = None,
    *,
    k: int | Sequence[int] | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    flat: Literal[False] = False,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
) -> list[SparseGrad]: ...


@overload
def topk_ef_(
    grad: Sequence[Array],
    err: Sequence[Array],
    ratio: float | None = None,
    *,
    k: int | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    flat: Literal[True],
    decay: float = 1.0,
    clip: float | Tensor | None = None,
) -> SparseGrad: ...


def topk_ef_(
    grad: Array | Sequence[Array],
    err: Array | Sequence[Array],
    ratio: float | None = None,
    *,
    k: int | Sequence[int] | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
    hint: Tensor | None = None,
    flat: bool = False,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> SparseGrad | list[SparseGrad]:
    """Selects the k largest entries of acc = grad + err; the rest stays in err.

    Exactly k entries by magnitude (NaN > Inf > finite), the lowest index wins a tie, indices ascend.
    Deterministic; no host synchronisation on CUDA. Runs on torch's current stream.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            Entries that would not be finite become 0: what is not finite travels and never stays.
        ratio: density in (0, 1]; k = max(1, ceil(ratio * numel)).
        k: entries kept, in [1, numel]; instead of ratio.
        value_dtype: float32, bfloat16 or float16 for the values that travel (rounded to nearest even);
            the rounding error stays in err.
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        hint: (1,) int32 on the same device, zero at first and then kept from step to step: holds the
            threshold of the last call (the bits of its magnitude), replaced by that of this one. Spares the
            sample that the threshold is guessed from. Whatever it holds, the result is the same. Not for
            lists.
        flat: for lists: select from all tensors together.
        decay: acc = fp32(grad) + clamp(decay * err, -clip, clip): the residual is multiplied by it as it is
            read; in (0, 1] as fp32 rounds it. What travels is what would if each call ended with
            err = clamp(decay * (acc - decoded), -clip, clip).
        clip: bound of what is added to the gradient: a number above 0, or a one-element fp32 tensor on the
            same device, which nobody waits for, and which counts as 0 where it is not above 0. None: no
            bound. A NaN in err stays NaN.
        stats: a `gck.Statistics` on the same device, overwritten. Not for lists.

    Lists of tensors, as grad and err, are worked on in a number of launches that does not depend on their
    number. By default each tensor keeps its own k entries (`k` may then be a list), and a list of payloads
    comes back; with `flat`, k is of all together, and one payload has indices into their concatenation. All
    payloads of a call lie in one buffer.

    Returns:
        SparseGrad(values (k,), indices (k,) int32, numel); int64 indices when numel > 2**31 - 1.
        Of lists: one a tensor, or one for all.

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Algorithm 1.
    """
    plainly = nonfinite is None and hint is None and clip is None and stats is None
    if plainly and type(decay) is float and decay == 1 and flat is False and not is_dynamo_compiling():
        payload: SparseGrad | None = direct.maker(TopK)(0, grad, err, ratio, k, value_dtype)
        if payload is not None:
            return payload
    if flat is not False:
        check_flags("topk_ef_", flat=flat)
    decay = plain_real(decay)
    checks.check_residual("topk_ef_", decay, None)
    if isinstance(grad, (list, tuple)) or isinstance(err, (list, tuple)):
        if hint is not None:
            raise ArgumentError("topk_ef_: hint is for single tensors, got one with lists")
        if stats is not None:
            raise ArgumentError(f"topk_ef_: stats are of single tensors, got {shown(stats)} with lists")
        g, e = cast("Sequence[Array]", grad), cast("Sequence[Array]", err)
        options: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip}
        return topk_ef_list_(g, e, ratio, k=k, flat=flat, value_dtype=value_dtype, **options)
    if flat:
        raise ArgumentError(f"topk_ef_: flat is for lists of tensors, got it with {shown(grad)}")
    if decay != 1 or clip is not None or stats is not None:
        given: Any = (grad, err, ratio, k, value_dtype, nonfinite, hint, decay, clip, stats)
        return _topk_ef_with(*given)
    return _topk_ef_one(
        cast("Array", grad), cast("Array", err), ratio, cast("int | None", k), value_dtype, nonfinite, hint
    )


def _topk_ef_one(
    grad: Array,
    err: Array,
    ratio: float | None,
    k: int | None,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    hint: Tensor | None,
) -> SparseGrad:
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("topk_ef_", ("err",), grad=grad, err=err) as (g, e):
            return _topk_ef_one(g, e, ratio, k, value_dtype, nonfinite, hint)
    ratio, k = plain_real(ratio), plain_int(k)
    is_plain = plain(grad, err, nonfinite, hint)
    if not (is_plain and checks.acceptable(grad, err)):
        check_options("topk_ef_", ratio, k, value_dtype)
        checks.check_grad("topk_ef_", grad)
        resolve_k("topk_ef_", grad.numel(), ratio, k)
        checks.check_pair("topk_ef_", grad, err)
    compressor, layout = _chosen("topk_ef_", grad.numel(), ratio, k, value_dtype, is_plain)
    checks.check_nonfinite("topk_ef_", nonfinite, grad)
    checks.check_scalar("topk_ef_", "hint", hint, torch.int32, grad)
    if is_plain:
        body = compress("topk_ef_", compressor, grad, err, nonfinite, hint=hint)
    else:
        count = layout.fields[0].count
        body = torch.ops.gck.topk_ef_(grad, err, count, value_dtype, nonfinite, hint)
    values, indices = layout.views(body)
    return SparseGrad(values, indices, grad.numel())


def _topk_ef_with(
    grad: Array,
    err: Array,
    ratio: float | None,
    k: int | None,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    hint: Tensor | None,
    decay: float,
    clip: float | Tensor | None,
    stats: Statistics | None,
) -> SparseGrad:
    """`_topk_ef_one` with options of the residual."""
    function = "topk_ef_"
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed(function, ("err",), grad=grad, err=err) as (g, e):
            return _topk_ef_with(g, e, ratio, k, value_dtype, nonfinite, hint, decay, clip, stats)
    ratio, k = plain_real(ratio), plain_int(k)
    check_options(function, ratio, k, value_dtype)
    checks.check_pair(function, grad, err)
    layout = _compressor(resolve_k(function, grad.numel(), ratio, k), value_dtype).layout(grad.numel())
    checks.check_nonfinite(function, nonfinite, grad)
    checks.check_scalar(function, "hint", hint, torch.int32, grad)
    residual = checks.residual_options(function, grad, decay, clip, stats)
    call = _topk_ef if plain(grad, err, nonfinite, hint, *residual[1:]) else torch.ops.gck.topk_ef_
    body = call(grad, err, layout.fields[0].count, value_dtype, nonfinite, hint, *residual)
    values, indices = layout.views(body)
    return SparseGrad(values, indices, grad.numel())


def topk(
    x: Array, ratio: float | None = None, *, k: int | None = None, value_dtype: torch.dtype = torch.float32
) -> SparseGrad:
    """The k largest entries of x by magnitude, without error feedback; x is read only.

    Arguments, result and errors as for `topk_ef_`.
    """
    if not isinstance(x, Tensor):
        with interop.borrowed("topk", (), x=x) as (tensor,):
            return topk(tensor, ratio, k=k, value_dtype=value_dtype)
    ratio, k = plain_real(ratio), plain_int(k)
    check_options("topk", ratio, k, value_dtype)
    checks.check_grad("topk", x, "x")
    is_plain = plain(x)
    compressor, layout = _chosen("topk", x.numel(), ratio, k, value_dtype, is_plain)
    if is_plain:
        body = compress("topk", compressor, x, None, None)
    else:
        body = torch.ops.gck.topk(x, layout.fields[0].count, value_dtype)
    values, indices = layout.views(body)
    return SparseGrad(values, indices, x.numel())


def _chosen(
    function: str, numel: int, ratio: float | None, k: int | None, value_dtype: torch.dtype, is_plain: bool
) -> tuple[TopK, Layout]:
    """The compressor that keeps as many as is wanted, and the payload's layout. Remembered where `is_plain`.

    Raises:
        ArgumentError, DtypeError: the options are wrong, as such or for a vector of `numel` elements.
    """
    # Tracing may bring symbolic sizes, which have no hash, as a caller may any option.
    if is_plain:
        try:
            return _choice(function, numel, ratio, k, value_dtype)
        except TypeError:
            pass
    return _choice.__wrapped__(function, numel, ratio, k, value_dtype)


@lru_cache(maxsize=1024, typed=True)  # True is no ratio, and no k
def _choice(
    function: str, numel: int, ratio: float | None, k: int | None, value_dtype: torch.dtype
) -> tuple[TopK, Layout]:
    check_options(function, ratio, k, value_dtype)
    compressor = _compressor(resolve_k(function, numel, ratio, k), value_dtype)
    return compressor, compressor.layout(numel)


def _compressor(k: int, value_dtype: torch.dtype, decay: float = 1.0) -> TopK:
    return TopK(k=max(1, k), value_dtype=value_dtype, decay=decay)  # of an empty vector nothing is kept


def _topk_ef(
    grad: Tensor,
    err: Tensor,
    k: int,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    compressor = _compressor(k, value_dtype, decay)
    return compress("topk_ef_", compressor, grad, err, nonfinite, clip, hint=hint, stats=stats)


def _topk(x: Tensor, k: int, value_dtype: torch.dtype) -> Tensor:
    return compress("topk", _compressor(k, value_dtype), x, None, None)


def _fake_topk_ef(
    grad: Tensor,
    err: Tensor,
    k: int,
    value_dtype: torch.dtype,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(_compressor(k, value_dtype), grad)


def _fake_topk(x: Tensor, k: int, value_dtype: torch.dtype) -> Tensor:
    return fake_body(_compressor(k, value_dtype), x)


register(
    "topk_ef_(Tensor grad, Tensor(a!) err, SymInt k, ScalarType value_dtype, Tensor(b!)? nonfinite,"
    " Tensor(c!)? hint=None, float decay=1.0, Tensor? clip=None, Tensor(d!)? stats=None) -> Tensor",
    _topk_ef,
    _fake_topk_ef,
)
register("topk(Tensor x, SymInt k, ScalarType value_dtype) -> Tensor", _topk, _fake_topk)
