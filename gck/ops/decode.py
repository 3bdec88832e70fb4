"""Payloads back to dense vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from gck import interop
from gck.compressor import compressor_class
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.kernels.chunk_topk import check_options
from gck.kernels.common import checks
from gck.kernels.sign import check_chunk_size
from gck.ops.registration import Array, register
from gck.payload import ChunkSparse, PackedSigns, Payload, SparseGrad

__all__ = ["decompress", "decompress_add_"]


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
    elif isinstance(payload, ChunkSparse):
        name, fields = "chunk_topk", [payload.values, payload.scales, payload.indices]
        options = [payload.chunk_size, payload.k, payload.value_bits]
        check_options(function, payload.k, payload.chunk_size, payload.value_bits)
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


def _decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    decoder = compressor_class(compressor).for_fields(tuple(fields), tuple(options))
    decoder.decompress(
        "decompress_add_" if accumulate else "decompress", out, tuple(fields), alpha, accumulate
    )
    torch.autograd.graph.increment_version(out)


def _fake_decompress(
    out: Tensor, compressor: str, fields: list[Tensor], options: list[int], alpha: float, accumulate: bool
) -> None:
    return None


register(
    "decompress_(Tensor(a!) out, str compressor, Tensor[] fields, int[] options, float alpha,"
    " bool accumulate) -> ()",
    _decompress,
    _fake_decompress,
)
