"""The CPU twin of quantize: hands addresses to the compiled kernel (bindings/cpu/quantize.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.kernels.common.native import DTYPE_CODE, residual_options

if TYPE_CHECKING:
    from gck.kernels.common.reduction import Reduction
    from gck.kernels.quantize import Quantize
    from gck.wire import Layout


def direct(compressor: Quantize, numel: int) -> Any:
    """See `gck.ops.direct`."""
    codes, scales = compressor.layout(numel).fields
    shape = (scales.count // 2, 2) if compressor.two_levels else (scales.count,)
    return load().direct_quantize(
        numel,
        compressor.layout(numel).native((codes.count,), shape),
        compressor.chunk_size,
        compressor.bits,
        compressor.two_levels,
        compressor.rounding == "stochastic",
    )


def compress_(
    compressor: Quantize,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    chunk_size = compressor.chunk_size
    shard = shard_numel(grad.numel(), chunk_size, bodies.shape[0])
    cleared = load().quantize_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        chunk_size,
        compressor.bits,
        compressor.two_levels,
        compressor.rounding == "stochastic",
        compressor.seed,
        compressor.first,
        bodies.data_ptr(),
        bodies.stride(0),
        -(-shard // chunk_size),
        compressor.layout(shard).fields[1].offset,
        num_threads(),
        residual_options(compressor.decay, clip, stats),
    )
    if nonfinite is not None:
        nonfinite += cleared


def decompress_(
    compressor: Quantize, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    _decompress(compressor, out, fields, 1, 0, alpha, clear=False, add=accumulate)


def decompress_sum_(
    compressor: Quantize, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order.

    Chunk by chunk, so that a dense chunk stays in the nearest cache while the ranks are walked.
    """
    fields = layout.views(bodies[0])
    ranks, stride = bodies.shape[0], bodies.stride(0)
    _decompress(compressor, out, fields, ranks, stride, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Quantize,
    out: Tensor,
    fields: tuple[Tensor, ...],
    ranks: int,
    rank_stride: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    codes, scales = fields
    load().quantize_decompress(
        codes.data_ptr(),
        scales.data_ptr(),
        ranks,
        rank_stride,
        compressor.chunk_size,
        compressor.bits,
        compressor.two_levels,
        out.data_ptr(),
        out.numel(),
        alpha,
        clear,
        add,
        num_threads(),
    )


def reduce_(compressor: Quantize, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`; tile by tile, so that sums stay in the nearest cache."""
    codes, scales = job.layout.views(job.bodies[0])
    server = job.server
    cleared = load().quantize_reduce(
        codes.data_ptr(),
        scales.data_ptr(),
        job.bodies.shape[0],
        job.bodies.stride(0),
        compressor.chunk_size,
        compressor.bits,
        compressor.two_levels,
        float(job.divisor),
        0 if job.err is None else job.err.data_ptr(),
        job.numel,
        server.bits,
        server.two_levels,
        server.rounding == "stochastic",
        server.seed,
        server.first,
        job.body.data_ptr(),
        server.layout(job.numel).fields[1].offset,
        num_threads(),
        residual_options(job.server.decay, job.clip, None),
    )
    if job.nonfinite is not None:
        job.nonfinite.add_(cleared)
