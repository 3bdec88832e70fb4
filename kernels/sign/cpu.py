"""The CPU twin of sign: hands addresses to the compiled kernel (bindings/cpu/sign.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.kernels.common.native import DTYPE_CODE, addresses, offsets, residual_options

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
    bodies, (scales,) = [fields[0].data_ptr()], offsets(fields)
    _decompress(compressor, out, bodies, scales, alpha, clear=False, add=accumulate)


def decompress_sum_(
    compressor: Sign, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    scales = layout.fields[1].offset
    _decompress(compressor, out, addresses(bodies), scales, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Sign,
    out: Tensor,
    bodies: list[int],
    scales_offset: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    load().sign_decompress(
        bodies,
        scales_offset,
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
    cleared = load().sign_reduce(
        addresses(job.bodies),
        job.layout.fields[1].offset,
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
