"""Calls that the compiled module answers by itself: it looks at the tensors, and makes those of the payload.
Of small vectors, all else would be most of the time.

What is not as it mostly is, it leaves to others: they tell what is wrong, if anything is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gck._native import num_threads, sees_tensors
from gck.errors import GckError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.common.base import backend
from gck.kernels.quantize import Quantize
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from gck.memory import empty, unwatched
from gck.payload import ChunkSparse, PackedSigns, Quantized, SparseGrad

__all__ = ["compress", "decompress"]

CPU = torch.device("cpu")


def compress(kind: Any, grad: Any, err: Any, *options: Any, seed: int = 0) -> tuple[Tensor, ...] | None:
    """The fields of the payload that `kind(*options)` makes of grad and err; None: nothing was done.

    A seed is none of the options where it is another one at every step.
    """
    if not (type(grad) is Tensor and grad.is_cpu and unwatched() and type(seed) is int):
        return None
    fields: tuple[Tensor, ...] | None = None
    try:
        native = _native(kind, grad.numel(), *options)
        if native is not None:
            fields = native.compress(grad, err, seed, num_threads())
    except (GckError, TypeError):
        return None
    if fields is not None:
        increment_version(err)
    return fields


def decompress(payload: Any, out: Any, alpha: float, accumulate: bool) -> Tensor | None:
    """out, or a new one where it is None, with alpha * decoded written or added; None: nothing was done."""
    if not (unwatched() and type(payload) in _COMPRESSORS and type(alpha) is float and isfinite(alpha)):
        return None
    done = False
    try:
        seed, native = _COMPRESSORS[type(payload)](payload)
        if native is not None and payload[0].is_cpu:
            if out is None:
                out = empty(payload.numel, torch.float32, CPU)
            done = native.decompress(payload, out, alpha, accumulate, seed, num_threads())
    except (GckError, TypeError, AttributeError):
        return None
    if not done:
        return None
    increment_version(out)
    return cast(Tensor, out)


@lru_cache(maxsize=1024, typed=True)  # True is no number
def _native(kind: Any, numel: Any, *options: Any) -> Any:
    """`kind(*options)` for vectors of `numel` elements, in the compiled module; None where it cannot."""
    if type(numel) is not int or numel < 1 or not sees_tensors():
        return None
    compressor = kind(*options)
    return backend("direct", kind.package, CPU).direct(compressor, numel)


# A payload's (seed, compressor).
_COMPRESSORS: dict[type, Callable[[Any], tuple[int, Any]]] = {
    SparseGrad: lambda p: (0, _native(TopK, p.numel, None, p.values.numel(), p.values.dtype)),
    PackedSigns: lambda p: (0, _native(Sign, p.numel, p.chunk_size)),
    ChunkSparse: lambda p: (
        0,
        _native(
            ChunkTopK, p.numel, p.k, p.chunk_size, p.value_bits, 12 if p.indices.dtype is torch.uint8 else 16
        ),
    ),
    Quantized: lambda p: (0, _native(Quantize, p.numel, p.bits, p.chunk_size, "nearest", 0, p.scale)),
}
