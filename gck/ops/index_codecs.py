"""Sparse payloads in fewer bytes."""

from __future__ import annotations

import torch

from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels import index_codecs
from gck.kernels.common import checks
from gck.payload import CodedSparse, SparseGrad
from gck.values import shown

__all__ = ["encode_indices"]


def encode_indices(payload: SparseGrad, index_codec: str = "elias_fano") -> CodedSparse:
    """The same entries with their indices in fewer bytes, to send them: see docs/index_codecs.md.

    Values are those of `payload`, not copied. `gck.decompress` takes the result, or a list of such, as
    `gck.sparse_all_gather` returns. No host synchronisation on CUDA.

    Args:
        payload: (k,) values and (k,) indices, of 1 <= k <= numel entries, or of none of an empty vector.
        index_codec: "elias_fano", about 2 + log2(numel / k) bits an index, or "block16", 16 bits.

    Raises:
        ArgumentError, DtypeError: an argument is of the wrong kind.
        CorruptPayloadError: the payload contradicts itself: lengths that differ, indices that do not ascend
            within [0, numel). On CUDA, where looking at them would stop the stream, what such indices become
            is undefined, and nothing is written out of bounds.
    """
    function = "encode_indices"
    if not isinstance(payload, SparseGrad):
        raise DtypeError(f"{function}: payload must be a SparseGrad, got {shown(payload)}")
    index_codecs.check_index_codec(function, index_codec)
    if index_codec == "int32":
        raise ArgumentError(
            f'{function}: index_codec must be "block16" or "elias_fano", got "int32", as payload has'
        )
    values, indices, numel = payload
    checks.check_tensor(function, "values", values)
    checks.check_tensor(function, "indices", indices)
    k = values.numel()
    if values.dim() != 1 or values.shape != indices.shape or not min(1, numel) <= k <= numel:
        raise CorruptPayloadError(
            f"{function}: payload of {tuple(values.shape)} values and {tuple(indices.shape)} indices "
            f"does not fit {numel} elements"
        )
    checks.check_device(function, "indices", indices, "values", values)
    try:
        low, high = index_codecs.encode(index_codec, indices, numel)
    except CorruptPayloadError as error:
        raise CorruptPayloadError(f"{function}: {error}") from None
    return CodedSparse(values, values.new_empty(0, dtype=torch.float32), low, high, numel, k, index_codec)
