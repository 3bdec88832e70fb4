"""Index codecs: strictly ascending indices of k elements of a vector, in few bytes.

How many bytes follows from the number of elements and k alone, so that messages have a size that all ranks
know. Bytes: docs/index_codecs.md.

Sources: Elias, "Efficient Storage and Retrieval by Content and Address of Static Files" (Journal of the ACM,
1974); Fano, "On the Number of Bits Required to Implement an Associative Memory" (MIT Project MAC, 1971);
Vigna, "Quasi-Succinct Indices" (WSDM 2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.coded_layout import INDEX_CODECS, index_fields
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks
from gck.kernels.common.base import backend
from gck.payload import index_dtype
from gck.values import shown

__all__ = ["check_index_codec", "decode", "encode"]


def check_index_codec(function: str, codec: object) -> None:
    """Raises unless `codec` is one of `gck.coded_layout.INDEX_CODECS`."""
    if codec not in INDEX_CODECS:
        names = ", ".join(f'"{name}"' for name in INDEX_CODECS)
        raise ArgumentError(f"{function}: index_codec must be one of {names}, got {codec!r}")


def encode(codec: str, indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The fields of `gck.coded_layout.index_fields` that hold these indices.

    Args:
        codec: one of `gck.coded_layout.INDEX_CODECS`.
        indices: (k,) int32, or int64 where numel > 2**31 - 1: strictly ascending within [0, numel).
        numel: elements of the vector that they are of.

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, LayoutError: an argument is out of range or of the
            wrong kind.
        CorruptPayloadError: the indices do not ascend within [0, numel). On CUDA, where looking would stop
            the stream, what is encoded is then undefined, and nothing is written out of bounds.
    """
    function = "index_codecs.encode"
    _check(function, codec, numel)
    checks.check_tensor(function, "indices", indices)
    if indices.dtype != index_dtype(numel):
        raise DtypeError(f"{function}: indices must be {index_dtype(numel)}, got {indices.dtype}")
    if indices.dim() != 1 or indices.numel() > numel:
        raise ShapeMismatchError(
            f"{function}: indices must be (k,) with k at most {numel}, got {tuple(indices.shape)}"
        )
    low, high = (
        torch.empty(count, dtype=dtype, device=indices.device)
        for dtype, count in index_fields(codec, numel, indices.numel())
    )
    encode_(codec, indices, numel, (low, high), function)
    return low, high


def decode(codec: str, fields: Sequence[Tensor], numel: int, k: int) -> Tensor:
    """(k,) indices, int32 or int64 where numel > 2**31 - 1, that `encode` made these fields of.

    Args:
        codec: one of `gck.coded_layout.INDEX_CODECS`.
        fields: contiguous tensors with the dtypes and counts that `gck.coded_layout.index_fields` says.
        numel: elements of the vector that the indices are of.
        k: how many they are; at most numel.

    Raises:
        ArgumentError, DtypeError, LayoutError: an argument is out of range or of the wrong kind.
        CorruptPayloadError: the fields are of the wrong size; or, on the CPU, hold another number of indices,
            or some that do not ascend within [0, numel), or a bit that no index has. On CUDA, where looking
            would stop the stream, nothing is read or written out of bounds, and an index that is not below
            numel or missing comes out as numel.
    """
    function = "index_codecs.decode"
    _check(function, codec, numel)
    if isinstance(k, bool) or not isinstance(k, int):
        raise DtypeError(f"{function}: k must be an int, got {shown(k)}")
    if not 0 <= k <= numel:
        raise ArgumentError(f"{function}: k must be in [0, numel = {numel}], got {k}")
    wanted = index_fields(codec, numel, k)
    for number, field in enumerate(fields):
        checks.check_tensor(function, f"field {number}", field)
    held = tuple((field.dtype, field.numel()) for field in fields)
    if held != wanted:
        raise CorruptPayloadError(f"{function}: fields of {k} indices must be {wanted}, got {held}")
    out = torch.empty(1, k, dtype=index_dtype(numel), device=fields[0].device)
    decode_(codec, [field.view(1, -1) for field in fields], numel, out, function)
    return out[0]


def _check(function: str, codec: object, numel: object) -> None:
    check_index_codec(function, codec)
    if isinstance(numel, bool) or not isinstance(numel, int):
        raise DtypeError(f"{function}: numel must be an int, got {shown(numel)}")
    if numel < 0:
        raise ArgumentError(f"{function}: numel must be at least 0, got {numel}")


def encode_(codec: str, indices: Tensor, numel: int, fields: Sequence[Tensor], function: str) -> None:
    """`encode` of arguments that fit into fields that fit, on behalf of `function`."""
    if codec == "int32":
        fields[0].copy_(indices)
    elif indices.numel():
        backend(function, __name__, indices.device).encode_(codec, indices, numel, fields)


def decode_(codec: str, fields: Sequence[Tensor], numel: int, out: Tensor, function: str) -> None:
    """`decode` of several ranks' fields, on behalf of `function`.

    Args:
        fields: (W, count) each, rows contiguous and at multiples of 16 bytes.
        out: (W, k), rows contiguous; overwritten. No row is of any meaning where an error is raised.
    """
    if codec == "int32":
        out.copy_(fields[0])
    elif out.numel():
        backend(function, __name__, out.device).decode_(codec, fields, numel, out)
