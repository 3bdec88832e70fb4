"""The CPU twin of sign: hands addresses to the compiled kernel (bindings/cpu/sign.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.kernels.common.native import DTYPE_CODE, residual_options

if TYPE_CHECKING:
    from gck.kernels.common.reduction import Reduction
    from gck.kernels.sign import Sign
    from gck.wire import Layout


def direct(compressor: Sign, numel: int) -> Any:
    """See `gck.ops.direct`."""
    return load().direct_sign(numel, compressor.layout(numel).native(), compressor.chunk_size)


def compress_(
    compressor: Sign,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    chunk_size = compressor.chunk_size
    shard = shard_numel(grad.numel(), chunk_size, bodies.shape[0])
    cleared = load().sign_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        chunk_size,
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
    compressor: Sign, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    _decompress(compressor, out, fields, 1, 0, alpha, clear=False, add=accumulate)


def decompress_sum_(
    compressor: Sign, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    fields = layout.views(bodies[0])
    ranks, stride = bodies.shape[0], bodies.stride(0)
    _decompress(compressor, out, fields, ranks, stride, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Sign,
    out: Tensor,
    fields: tuple[Tensor, ...],
    ranks: int,
    rank_stride: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    words, scales = fields
    load().sign_decompress(
        words.data_ptr(),
        scales.data_ptr(),
        ranks,
        rank_stride,
        compressor.chunk_size,
        out.data_ptr(),
        out.numel(),
        alpha,
        clear,
        add,
        num_threads(),
    )


def reduce_(compressor: Sign, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`; tile by tile, so that sums stay in the nearest cache."""
    words, scales = job.layout.views(job.bodies[0])
    cleared = load().sign_reduce(
        words.data_ptr(),
        scales.data_ptr(),
        job.bodies.shape[0],
        job.bodies.stride(0),
        compressor.chunk_size,
        float(job.divisor),
        0 if job.err is None else job.err.data_ptr(),
        job.numel,
        job.body.data_ptr(),
        job.server.layout(job.numel).fields[1].offset,
        num_threads(),
        residual_options(job.server.decay, job.clip, None),
    )
    if job.nonfinite is not None:
        job.nonfinite.add_(cleared)
