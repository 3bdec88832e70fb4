"""Calls that the compiled module answers by itself: it looks at the tensors, and makes those of the payload.
Of small vectors, all else would be most of the time.

What is not as it mostly is, it leaves to others: they tell what is wrong, if anything is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gck._native import load, num_threads, sees_tensors
from gck.errors import GckError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.common.base import backend
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from gck.memory import WATCHERS, empty, unwatched
from gck.payload import ChunkSparse, PackedSigns, Quantized, SeededValues, SparseGrad
from gck.values import MOST_FP32

__all__ = ["decompress", "maker"]

CPU = torch.device("cpu")

# What increment_version calls with a tuple: half of its time is Python's.
_written: Callable[[tuple[Tensor, ...]], None] = getattr(torch._C, "_increment_version", increment_version)


@cache
def maker(kind: Any) -> Callable[..., Any]:
    """A function of (seed, grad, err, *options), by position, that returns the payload that `kind(*options)`
    makes of grad and err; None: nothing was done.

    A seed is none of the options where it is another one at every step. Not to be called in a trace.
    """
    try:
        if not sees_tensors():
            return _leave
        make = load().payload_maker
    except GckError:  # who is asked next says it
        return _leave
    return cast("Callable[..., Any]", make(partial(_known, kind), WATCHERS, torch.get_num_threads, _written))


def _leave(*_: Any) -> None:
    """A maker that leaves all to others."""


def _known(kind: Any, numel: int, *options: Any) -> tuple[Any, type, tuple[Any, ...]] | None:
    """What the compiled module is to know of `kind(*options)` and payloads of `numel` elements."""
    try:
        native = _native(kind, numel, *options)
    except (GckError, TypeError):
        return None
    if native is None:
        return None
    payload, rest = _PAYLOADS[kind]
    return native, payload, rest(numel, *options)


def decompress(payload: Any, out: Any, alpha: Any, accumulate: bool) -> Tensor | None:
    """out, or a new one where it is None, with alpha * decoded written or added, of each payload of a list in
    turn; None: nothing was done. alpha may be a list, too, of as many numbers as payloads.

    The payloads of a list are read where they lie, if in each the fields lie at the same distances.
    """
    alphas = [*alpha] if type(alpha) is list else [alpha]
    if not (unwatched() and all(type(each) in (float, int) and abs(each) <= MOST_FP32 for each in alphas)):
        return None
    done, summed = False, type(payload) is list
    try:
        # A list of our own: the other one may be changed meanwhile, by another thread.
        payloads = [*payload] if summed else [payload]
        first, *others = payloads
        known = _decoder(first)
        if known is not None and all(_decoder(other) == known for other in others):
            native, seed = known
            if out is None:
                out = empty(first.numel, torch.float32, CPU)
            add = summed or accumulate
            done = native.decompress(payloads, out, alphas, not accumulate, add, seed, num_threads())
    except (GckError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if not done:
        return None
    increment_version(out)
    return cast("Tensor", out)


def _decoder(payload: Any) -> tuple[Any, int] | None:
    """What decodes a payload, in the compiled module, and its seed; None: it is for others to look at."""
    if type(payload) not in _MAKERS or not payload[0].is_cpu:
        return None
    kind, options = _MAKERS[type(payload)]
    seed = payload.seed if kind is RandomK else 0
    native = _native(kind, payload.numel, *options(payload))
    return None if native is None or type(seed) is not int else (native, seed)


@lru_cache(maxsize=1024, typed=True)  # True is no number
def _native(kind: Any, numel: Any, *options: Any) -> Any:
    """`kind(*options)` for vectors of `numel` elements, in the compiled module; None where it cannot."""
    if type(numel) is not int or numel < 1 or not sees_tensors():
        return None
    if any(type(option) is not int and isinstance(option, Integral) for option in options):
        return None  # payloads hold plain ints
    compressor = kind(*options)
    return backend("direct", kind.package, CPU).direct(compressor, numel)


# The payload that a compressor makes, and what follows the tensors in it; None: the seed.
_PAYLOADS: dict[Any, tuple[type, Callable[..., tuple[Any, ...]]]] = {
    TopK: (SparseGrad, lambda numel, *_: (numel,)),
    Sign: (PackedSigns, lambda numel, chunk_size: (numel, chunk_size)),
    ChunkTopK: (ChunkSparse, lambda numel, k, size, value_bits, _: (numel, size, k, value_bits)),
    Quantize: (Quantized, lambda numel, bits, size, rounding, seed, scale: (numel, size, bits, scale)),
    RandomK: (SeededValues, lambda numel, *_: (None, numel)),
}

# What has made a payload, and with which options.
_MAKERS: dict[type, tuple[Any, Callable[[Any], tuple[Any, ...]]]] = {
    SparseGrad: (TopK, lambda p: (None, p.values.numel(), p.values.dtype)),
    PackedSigns: (Sign, lambda p: (p.chunk_size,)),
    ChunkSparse: (ChunkTopK, lambda p: (p.k, p.chunk_size, p.value_bits, _index_bits(p.indices))),
    Quantized: (Quantize, lambda p: (p.bits, p.chunk_size, "nearest", 0, p.scale)),
    SeededValues: (RandomK, lambda p: (None, p.values.numel(), 0, p.values.dtype)),
}


def _index_bits(indices: Tensor) -> int:
    return 12 if indices.dtype is torch.uint8 else 16
