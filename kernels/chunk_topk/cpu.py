"""The CPU twin of chunk top-k: hands addresses to the compiled kernel (bindings/cpu/chunk_topk.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.errors import CorruptPayloadError
from gck.kernels.common.native import DTYPE_CODE, addresses, offsets, residual_options

if TYPE_CHECKING:
    from gck.kernels.chunk_topk import ChunkTopK
    from gck.kernels.common.reduction import Reduction
    from gck.wire import Layout


def direct(compressor: ChunkTopK, numel: int) -> Any:
    """See `gck.ops.direct`."""
    shapes = [(compressor.chunks(numel), count) for count in compressor.row]
    return load().direct_chunk_topk(
        numel,
        compressor.layout(numel).native(*shapes),
        compressor.chunk_size,
        compressor.k,
        compressor.value_bits,
        12 if compressor.packs_indices else 16,
    )


def compress_(
    compressor: ChunkTopK,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    shard = shard_numel(grad.numel(), compressor.chunk_size, bodies.shape[0])
    _, scales, indices = compressor.layout(shard).fields
    cleared = load().chunk_topk_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        compressor.chunk_size,
        compressor.k,
        compressor.value_bits,
        12 if compressor.packs_indices else 16,
        bodies.data_ptr(),
        bodies.stride(0),
        compressor.chunks(shard),
        scales.offset,
        indices.offset,
        num_threads(),
        residual_options(compressor.decay, clip, stats),
    )
    if nonfinite is not None:
        nonfinite += cleared


def decompress_(
    compressor: ChunkTopK, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    bodies, others = [fields[0].data_ptr()], offsets(fields)
    _decompress(compressor, out, bodies, others, alpha, clear=not accumulate, add=accumulate)


def decompress_sum_(
    compressor: ChunkTopK,
    out: Tensor,
    bodies: Tensor,
    layout: Layout,
    alpha: float,
    accumulate: bool,
    divisor: int = 1,
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order; then
    out /= divisor, which is 1 where `accumulate`.

    Chunk by chunk, so that a dense chunk stays in the nearest cache while the ranks are walked.
    """
    others = [field.offset for field in layout.fields[1:]]
    _decompress(
        compressor, out, addresses(bodies), others, alpha, clear=not accumulate, add=True, divisor=divisor
    )


decompress_mean_ = decompress_sum_


def _decompress(
    compressor: ChunkTopK,
    out: Tensor,
    bodies: list[int],
    others: list[int],
    alpha: float,
    *,
    clear: bool,
    add: bool,
    divisor: int = 1,
) -> None:
    """`others`: where scales and indices lie, from the values, which a body begins with."""
    bad = load().chunk_topk_decompress(
        bodies,
        *others,
        compressor.chunk_size,
        compressor.k,
        compressor.value_bits,
        12 if compressor.packs_indices else 16,
        out.data_ptr(),
        out.numel(),
        alpha,
        clear,
        add,
        float(divisor),
        num_threads(),
    )
    _refuse(compressor, bad, out.numel(), len(bodies))


def reduce_(compressor: ChunkTopK, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`; chunk by chunk, so that sums stay in a near cache."""
    server = job.server
    _, scales, indices = job.layout.fields
    _, server_scales, server_indices = server.layout(job.numel).fields
    bad, cleared = load().chunk_topk_reduce(
        addresses(job.bodies),
        scales.offset,
        indices.offset,
        compressor.chunk_size,
        compressor.k,
        compressor.value_bits,
        12 if compressor.packs_indices else 16,
        float(job.divisor),
        0 if job.err is None else job.err.data_ptr(),
        job.numel,
        server.k,
        server.value_bits,
        12 if server.packs_indices else 16,
        job.body.data_ptr(),
        server_scales.offset,
        server_indices.offset,
        num_threads(),
        residual_options(job.server.decay, job.clip, None),
    )
    _refuse(compressor, bad, job.numel, job.bodies.shape[0])
    if job.nonfinite is not None:
        job.nonfinite.add_(cleared)


def _refuse(compressor: ChunkTopK, bad: int, numel: int, ranks: int) -> None:
    """Raises if there is a bad index: at `bad`, as bindings/cpu/chunk_topk.hpp counts places; -1: none."""
    if bad < 0:
        return
    place, entry = divmod(bad, compressor.k)
    rank, chunk = divmod(place, compressor.chunks(numel))
    valid = min(compressor.chunk_size, numel - chunk * compressor.chunk_size)
    raise CorruptPayloadError(
        f"indices of a chunk must ascend within [0, {valid}), but entry {entry} of chunk "
        f"{chunk} does not" + (f" in body {rank}" if ranks > 1 else "")
    )
