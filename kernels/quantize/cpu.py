"""The CPU twin of quantize: hands addresses to the compiled kernel (bindings/cpu/quantize.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.kernels.common.native import DTYPE_CODE, addresses, offsets, residual_options

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
        compressor.key,
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
    bodies, (scales,) = [fields[0].data_ptr()], offsets(fields)
    _decompress(compressor, out, bodies, scales, alpha, clear=False, add=accumulate)


def decompress_sum_(
    compressor: Quantize, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order.

    Chunk by chunk, so that a dense chunk stays in the nearest cache while the ranks are walked.
    """
    scales = layout.fields[1].offset
    _decompress(compressor, out, addresses(bodies), scales, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Quantize,
    out: Tensor,
    bodies: list[int],
    scales_offset: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    load().quantize_decompress(
        bodies,
        scales_offset,
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
    server = job.server
    cleared = load().quantize_reduce(
        addresses(job.bodies),
        job.layout.fields[1].offset,
        compressor.chunk_size,
        compressor.bits,
        compressor.two_levels,
        float(job.divisor),
        0 if job.err is None else job.err.data_ptr(),
        job.numel,
        server.bits,
        server.two_levels,
        server.rounding == "stochastic",
        server.key,
        server.first,
        job.body.data_ptr(),
        server.layout(job.numel).fields[1].offset,
        num_threads(),
        residual_options(job.server.decay, job.clip, None),
    )
    if job.nonfinite is not None:
        job.nonfinite.add_(cleared)
