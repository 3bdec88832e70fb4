"""The functional API, and its registration as torch.library operators.

Each operator returns the payload's body, one uint8 buffer; the functions here check what can be
checked without looking at memory and give the body its typed views. So they trace under
`torch.compile(fullgraph=True)`, and in eager mode cost one dispatch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from gck import interop
from gck.compressor import compressor_class
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.kernels.sign import Sign, check_chunk_size
from gck.kernels.topk import TopK, check_options, resolve_k
from gck.payload import PackedSigns, Payload, SparseGrad

__all__ = ["decompress", "decompress_add_", "sign_ef_", "topk", "topk_ef_"]


class Array(Protocol):
    """A torch tensor, or anything that speaks DLPack: NumPy and CuPy arrays among them."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


def topk_ef_(
    grad: Array,
    err: Array,
    ratio: float | None = None,
    *,
    k: int | None = None,
    value_dtype: torch.dtype = torch.float32,
    nonfinite: Tensor | None = None,
) -> SparseGrad:
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

    Returns:
        SparseGrad(values (k,), indices (k,) int32, numel); int64 indices when numel > 2**31 - 1.

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Algorithm 1.
    """
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("topk_ef_", ("err",), grad=grad, err=err) as (g, e):
            return topk_ef_(g, e, ratio, k=k, value_dtype=value_dtype, nonfinite=nonfinite)
    check_options("topk_ef_", ratio, k, value_dtype)
    checks.check_grad("topk_ef_", grad)
    count = resolve_k("topk_ef_", grad.numel(), ratio, k)
    compressor = TopK(k=max(1, count), value_dtype=value_dtype)
    compressor.check_inputs("topk_ef_", grad, err, nonfinite)
    body = torch.ops.gck.topk_ef_(grad, err, count, value_dtype, nonfinite)
    values, indices = compressor.layout(grad.numel()).views(body)
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
    check_options("topk", ratio, k, value_dtype)
    checks.check_grad("topk", x, "x")
    count = resolve_k("topk", x.numel(), ratio, k)
    body = torch.ops.gck.topk(x, count, value_dtype)
    compressor = TopK(k=max(1, count), value_dtype=value_dtype)
    values, indices = compressor.layout(x.numel()).views(body)
    return SparseGrad(values, indices, x.numel())


def sign_ef_(
    grad: Array, err: Array, chunk_size: int = 256, *, nonfinite: Tensor | None = None
) -> PackedSigns:
    """Packs the signs of acc = grad + err with the mean |acc| of each chunk; the rest stays in err.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            A chunk whose scale is not finite travels as such and leaves zeros.
        chunk_size: elements a scale, a power of two in [32, 8192].
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.

    Returns:
        PackedSigns(words (ceil(numel / 32),) uint32, scales (ceil(numel / chunk_size),) fp32, numel,
        chunk_size).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), Algorithm 1.
    """
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("sign_ef_", ("err",), grad=grad, err=err) as (g, e):
            return sign_ef_(g, e, chunk_size, nonfinite=nonfinite)
    check_chunk_size("sign_ef_", chunk_size)
    compressor = Sign(chunk_size)
    compressor.check_inputs("sign_ef_", grad, err, nonfinite)
    body = torch.ops.gck.sign_ef_(grad, err, chunk_size, nonfinite)
    words, scales = compressor.layout(grad.numel()).views(body)
    return PackedSigns(words, scales, grad.numel(), chunk_size)


def decompress(payload: Payload, out: Array | None = None) -> Tensor:
    """The dense vector that a receiver of `payload` sees.

    Args:
        payload: any payload of gck.
        out: (payload.numel elements) fp32, contiguous, on the payload's device; overwritten.

    Returns:
        out, or a new (numel,) fp32 tensor.

    Raises:
        ShapeMismatchError: out has another number of elements than the payload.
        CorruptPayloadError: the payload contradicts itself. On CUDA, where looking at the indices would
            stop the stream, those out of range are skipped instead.
    """
    _, fields, _ = _parts("decompress", payload)
    if out is None:
        out = torch.empty(payload.numel, dtype=torch.float32, device=fields[0].device)
    return _decode("decompress", out, payload, 1.0, False)


def decompress_add_(out: Array, payload: Payload, alpha: float = 1.0) -> Tensor:
    """Adds alpha * decompress(payload) to out: one product and one sum in fp32 an element.

    Args and errors as for `decompress`; alpha must be finite. Returns out.
    """
    return _decode("decompress_add_", out, payload, alpha, True)


def _parts(function: str, payload: object) -> tuple[str, list[Tensor], list[int]]:
    """(compressor's name, fields, options) of a payload that is well formed as far as shapes tell."""
    # Spelled out by type: older versions of torch.compile cannot trace a NamedTuple's properties.
    if isinstance(payload, SparseGrad):
        name, fields, options = "topk", [payload.values, payload.indices], []
    elif isinstance(payload, PackedSigns):
        name, fields, options = "sign", [payload.words, payload.scales], [payload.chunk_size]
        check_chunk_size(function, payload.chunk_size)
    else:
        raise DtypeError(f"{function}: payload must be a payload of gck, got {type(payload).__name__}")
    for index, field in enumerate(fields):
        checks.check_tensor(function, f"payload field {index}", field)
        checks.check_not_recorded(function, f"payload field {index}", field)
    if isinstance(payload.numel, bool) or not isinstance(payload.numel, (int, torch.SymInt)):
        raise DtypeError(f"{function}: payload.numel must be an int, got {type(payload.numel).__name__}")
    if payload.numel < 0:
        raise ArgumentError(f"{function}: payload.numel must be at least 0, got {payload.numel}")
    return name, fields, options


def _decode(function: str, out: Array, payload: Payload, alpha: float, accumulate: bool) -> Tensor:
    name, fields, options = _parts(function, payload)
    if not isinstance(out, Tensor):
        with interop.borrowed(function, ("out",), out=out) as (tensor,):
            return _decode(function, tensor, payload, alpha, accumulate)
    checks.check_fp32(function, "out", out)
    if out.numel() != payload.numel:
        raise ShapeMismatchError(
            f"{function}: out has {out.numel()} elements, the payload is of {payload.numel}"
        )
    alpha = checks.check_alpha(function, alpha)
    torch.ops.gck.decompress_(out, name, fields, options, alpha, accumulate)
    return out


_library = torch.library.Library("gck", "DEF")
_library.define(
    "topk_ef_(Tensor grad, Tensor(a!) err, SymInt k, ScalarType value_dtype, Tensor(b!)? nonfinite) -> Tensor"
)
_library.define("topk(Tensor x, SymInt k, ScalarType value_dtype) -> Tensor")
_library.define("sign_ef_(Tensor grad, Tensor(a!) err, int chunk_size, Tensor(b!)? nonfinite) -> Tensor")
_library.define(
    "decompress_(Tensor(a!) out, str compressor, Tensor[] fields, int[] options, float alpha,"
    " bool accumulate) -> ()"
)


def _compress(
    function: str, compressor: KernelCompressor, grad: Tensor, err: Tensor | None, nonfinite: Tensor | None
) -> Tensor:
    # Not zeroed as a whole: kernels write all of a single body's fields, and it may be large.
    body = compressor.layout(grad.numel()).empty_body(grad.device)
    compressor.compress(function, grad, err, body.unsqueeze(0), nonfinite)
    mutated = [t for t in (err, nonfinite) if t is not None]
    torch.autograd.graph.increment_version(mutated)
    return body


def _topk_ef(grad: Tensor, err: Tensor, k: int, value_dtype: torch.dtype, nonfinite: Tensor | None) -> Tensor:
    return _compress("topk_ef_", TopK(k=max(1, k), value_dtype=value_dtype), grad, err, nonfinite)


def _topk(x: Tensor, k: int, value_dtype: torch.dtype) -> Tensor:
    return _compress("topk", TopK(k=max(1, k), value_dtype=value_dtype), x, None, None)


def _sign_ef(grad: Tensor, err: Tensor, chunk_size: int, nonfinite: Tensor | None) -> Tensor:
    return _compress("sign_ef_", Sign(chunk_size), grad, err, nonfinite)


def _decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    decoder = compressor_class(compressor).for_fields(tuple(fields), tuple(options))
    decoder.decompress(
        "decompress_add_" if accumulate else "decompress", out, tuple(fields), alpha, accumulate
    )
    torch.autograd.graph.increment_version(out)


def _fake_topk_ef(
    grad: Tensor, err: Tensor, k: int, value_dtype: torch.dtype, nonfinite: Tensor | None
) -> Tensor:
    return _fake_body(TopK(k=max(1, k), value_dtype=value_dtype), grad)


def _fake_topk(x: Tensor, k: int, value_dtype: torch.dtype) -> Tensor:
    return _fake_body(TopK(k=max(1, k), value_dtype=value_dtype), x)


def _fake_sign_ef(grad: Tensor, err: Tensor, chunk_size: int, nonfinite: Tensor | None) -> Tensor:
    return _fake_body(Sign(chunk_size), grad)


def _fake_body(compressor: KernelCompressor, grad: Tensor) -> Tensor:
    return grad.new_empty((compressor.layout(grad.numel()).nbytes,), dtype=torch.uint8)


def _fake_decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    return None


for _name, _kernel, _fake in (
    ("topk_ef_", _topk_ef, _fake_topk_ef),
    ("topk", _topk, _fake_topk),
    ("sign_ef_", _sign_ef, _fake_sign_ef),
    ("decompress_", _decompress, _fake_decompress),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"gck::{_name}", _fake, lib=_library)
