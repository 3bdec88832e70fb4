"""The CPU twin of index codecs: hands addresses to the compiled code (bindings/cpu/index_codecs.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.coded_layout import elias_fano_bits
from gck.errors import CorruptPayloadError

# enum class IndexFault in bindings/cpu/index_codecs.hpp
COUNT, PADDING, ORDER = 1, 2, 3


def encode_(codec: str, indices: Tensor, numel: int, fields: Sequence[Tensor]) -> None:
    """Fields of k >= 1 indices."""
    k = indices.numel()
    given = indices.data_ptr(), indices.dtype == torch.int64, k, numel
    encode = load().elias_fano_encode if codec == "elias_fano" else load().block16_encode
    if encode(*given, *_places(codec, fields, numel, k), num_threads()):
        raise CorruptPayloadError(f"indices must ascend within [0, {numel})")


def decode_(codec: str, fields: Sequence[Tensor], numel: int, out: Tensor) -> None:
    """Indices of W >= 1 ranks, k >= 1 of each."""
    ranks, k = out.shape
    decode = load().elias_fano_decode if codec == "elias_fano" else load().block16_decode
    for rank in range(ranks):
        row = out[rank]
        given = row.data_ptr(), row.dtype == torch.int64, k, numel
        fault = decode(*given, *_places(codec, [field[rank] for field in fields], numel, k), num_threads())
        if fault:
            which = f"payload {rank}: " if ranks > 1 else ""
            raise CorruptPayloadError(f"{which}{codec} indices: {_said(fault, numel, k)}")


def _places(codec: str, fields: Sequence[Tensor], numel: int, k: int) -> tuple[int, ...]:
    """Where the fields are, and what else a codec wants to know."""
    low, high = fields
    if codec == "block16":
        return low.data_ptr(), high.data_ptr()
    low_bits, high_bits = elias_fano_bits(numel, k)
    return low_bits, low.data_ptr(), low.numel(), high.data_ptr(), high_bits


def _said(fault: int, numel: int, k: int) -> str:
    if fault == COUNT:
        return f"there must be {k} of them, no more and no fewer"
    if fault == PADDING:
        return "bits past the last one must be 0"
    return f"they must ascend within [0, {numel})"
