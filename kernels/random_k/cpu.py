"""The CPU twin of random-k: hands addresses to the compiled kernel (bindings/cpu/random_k.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.kernels.common.native import DTYPE_CODE, addresses, residual_options

if TYPE_CHECKING:
    from gck.kernels.random_k import RandomK
    from gck.wire import Layout


def direct(compressor: RandomK, numel: int) -> Any:
    """See `gck.ops.direct`; with a residual, and of any seed."""
    layout = compressor.layout(numel)
    return load().direct_random_k(numel, layout.native(), DTYPE_CODE[compressor.value_dtype])


def compress_(
    compressor: RandomK,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    (values,) = compressor.layout(grad.numel()).fields
    cleared = load().random_k_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        values.count,
        compressor.seed,
        compressor.factor(grad.numel()),
        bodies.data_ptr(),
        DTYPE_CODE[values.dtype],
        num_threads(),
        residual_options(compressor.decay, clip, stats),
    )
    if nonfinite is not None:
        nonfinite += cleared


def decompress_(
    compressor: RandomK, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    (values,) = fields
    entries = values.numel(), values.dtype
    _decompress(compressor, out, [values.data_ptr()], entries, alpha, clear=not accumulate, add=accumulate)


def decompress_sum_(
    compressor: RandomK, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * decoded, for each row of bodies (W, layout.nbytes) in turn.

    Tile by tile, so that the same few lines of `out` stay in the nearest cache while the ranks are walked.
    """
    (values,) = layout.fields
    entries = values.count, values.dtype
    _decompress(compressor, out, addresses(bodies), entries, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: RandomK,
    out: Tensor,
    bodies: list[int],
    entries: tuple[int, torch.dtype],
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    k, value_dtype = entries
    load().random_k_decompress(
        bodies,
        k,
        DTYPE_CODE[value_dtype],
        compressor.seed,
        out.data_ptr(),
        out.numel(),
        alpha,
        clear,
        add,
        num_threads(),
    )


def indices(seed: int, numel: int, k: int, first: int = 0, count: int | None = None) -> Tensor:
    """(count,) int64: the indices with ranks [first, first + count) among the k ascending ones.

    Takes time and memory for these alone, whatever numel is.
    """
    out = torch.empty(k - first if count is None else count, dtype=torch.int64)
    load().random_k_indices(seed, numel, k, first, out.numel(), out.data_ptr())
    return out
