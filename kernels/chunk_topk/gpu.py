"""Chunk top-k with error feedback on the GPU: one program owns a chunk, or a group of small ones.

It moves acc = grad + err of its chunks to err, finds the positions of the largest (`gpu_select`, and
`gpu_rows` for small chunks), writes them in order, and after a barrier reads its compact entries back: codes,
scales and the residuals of what was selected are made from those (`gpu_encode`).

A program has few warps, mostly one, so that reductions need no barrier, and a processor has many programs:
what one waits for, the others fill.

Row s of `bodies` is a shard's body; the grid is (groups a shard, shards).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.compressor import shard_numel
from gck.kernels.chunk_topk.gpu_decode import decompress_, decompress_sum_
from gck.kernels.chunk_topk.gpu_encode import (
    chunk_of,
    clear_rest,
    encode,
    indices_of,
    scales_of,
    values_of,
)
from gck.kernels.chunk_topk.gpu_rows import select_rows
from gck.kernels.chunk_topk.gpu_select import select_chunk
from gck.kernels.common.gpu_statistics import finish, partial_sums
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import residual_arguments
from gck.kernels.common.statistics import sum_stored

__all__ = ["compress_", "decompress_", "decompress_sum_", "reduce_"]

GROUP = 512  # elements of a program's small chunks together
WARP_PART = 512  # elements of a chunk that a warp accumulates together
# One that has a chunk to itself accumulates so many, which takes all of its registers: as much as possible is
# under way then.
LONE_PART = 4096
WARP_STEP = 256  # elements that a warp looks at together of a chunk that it walks
CHUNK_WARP_ELEMENTS = 4096  # elements of a chunk for each of its warps
WARP_SLOTS = 64  # entries of a chunk for each of its warps
MAX_WARPS = 16


@triton.jit
def compress_group(
    p_grad,
    p_err,
    p_position,
    p_values,
    p_scales,
    p_indices,
    p_nonfinite,
    p_sums,
    i_shard,
    i_chunk,
    row_units,
    n,
    base,
    left,
    number,
    decay,
    p_clip,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOT_LEVELS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """Compresses CHUNKS chunks of 2**LEVELS elements, a row each, or one alone: acc is what lies at p_grad,
    `divided`, and the residual. `left` elements exist, from the vector's `base`-th on; p_grad, p_err and
    p_position are theirs. They are sent as the i_chunk-th row, and those after it, of the i_shard-th body.
    Positions have room for CAPACITY a chunk, and for K."""
    CHUNK: tl.constexpr = 2**LEVELS
    STRIDE: tl.constexpr = max(K, CAPACITY)
    given = (p_grad, p_err, p_position, left, number, decay, p_clip)
    if CHUNKS == 1:
        wanted, wild = select_chunk(*given, K, LEVELS, GROUPS, CAPACITY, PART, STEP, DIVISION, RESIDUAL)
        b_wanted = tl.zeros((1,), tl.int32) + wanted
    elif left == CHUNKS * CHUNK:
        b_wanted, wild = select_rows(*given, K, CHUNKS, LEVELS, GROUPS, STRIDE, DIVISION, RESIDUAL, True)
    else:
        b_wanted, wild = select_rows(*given, K, CHUNKS, LEVELS, GROUPS, STRIDE, DIVISION, RESIDUAL, False)
    tl.debug_barrier()
    if STATS:
        sum_stored(p_err, p_sums, n, base, left, True)
    encode(
        *(p_err, p_position),
        chunk_of(p_values, i_shard, i_chunk, row_units, values_of(K, BITS)),
        chunk_of(p_scales, i_shard, i_chunk, row_units, scales_of(BITS)),
        chunk_of(p_indices, i_shard, i_chunk, row_units, indices_of(K, INDEX_BITS)),
        *(p_nonfinite, b_wanted, K, LEVELS, BITS, INDEX_BITS, SLOT_LEVELS, STRIDE),
    )
    if wild:
        tl.debug_barrier()
        clear_rest(p_err, p_nonfinite, left, STEP)
    if STATS:
        sum_stored(p_err, p_sums, n, base, left, False)


@triton.jit(do_not_specialize=["n", "shard_chunks", "row_units"])
def compress_kernel(
    p_grad,
    p_err,
    p_position,
    p_values,
    p_scales,
    p_indices,
    p_nonfinite,
    p_sums,
    n,
    shard_chunks,
    row_units,
    decay,
    p_clip,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOT_LEVELS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """A program compresses a group of CHUNKS chunks; positions of all shards lie in one array."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_shard = tl.program_id(1).to(tl.int64)
    # The last chunk first, because a part of a chunk takes longest.
    i_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * CHUNKS
    i_first = i_shard * shard_chunks + i_chunk
    # The last group of a shard stops at the shard's end: what follows belongs to the next row.
    stop = tl.minimum((i_shard + 1) * shard_chunks * CHUNK, tl.cast(n, tl.int64))
    left = tl.minimum(stop - i_first * CHUNK, CHUNKS * CHUNK).to(tl.int32)
    if left > 0:
        compress_group(
            p_grad + i_first * CHUNK,
            p_err + i_first * CHUNK,
            p_position + i_first * max(K, CAPACITY),
            *(p_values, p_scales, p_indices, p_nonfinite, p_sums, i_shard, i_chunk, row_units),
            *(n, i_first * CHUNK, left, 1.0, decay, p_clip),
            *(K, CHUNKS, LEVELS, GROUPS, CAPACITY, BITS, INDEX_BITS, SLOT_LEVELS, PART, STEP),
            *("none", RESIDUAL, STATS),
        )


def compress_options(
    compressor: Any, residual: int = 0, *, stats: bool = False
) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `compress_kernel`."""
    chunk, slots = compressor.chunk_size, triton.next_power_of_2(compressor.k)
    # Many entries need threads as well as many elements do.
    warps = min(max(chunk // CHUNK_WARP_ELEMENTS, slots // WARP_SLOTS, 1), max(chunk // WARP_STEP // 2, 1))
    warps = min(warps, MAX_WARPS)
    rows, groups, capacity = chunk // 4, slots, 0
    if chunk >= GROUP:
        groups = min(slots, rows)
        if rows >= 2 * slots:
            # The more groups, the fewer rows reach a floor that K of the maxima reach: of independent
            # elements 1.4 K with 2 K groups, and 1.15 K with 4 K.
            groups, capacity = min(4 * slots, rows), 2 * slots
    options = {
        "K": compressor.k,
        "CHUNKS": max(GROUP // chunk, 1),
        "LEVELS": chunk.bit_length() - 1,
        "GROUPS": groups,
        "CAPACITY": capacity,
        "BITS": compressor.value_bits,
        "INDEX_BITS": 12 if compressor.packs_indices else 16,
        "SLOT_LEVELS": max(slots, 8).bit_length() - 1,
        "PART": min(LONE_PART if warps == 1 else WARP_PART * warps, chunk),
        "STEP": WARP_STEP * warps,
        "RESIDUAL": residual,
        "STATS": stats,
    }
    return options, warps


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    n, chunk, k, shards = grad.numel(), compressor.chunk_size, compressor.k, bodies.shape[0]
    shard = shard_numel(n, chunk, shards)
    shard_chunks = compressor.chunks(shard)
    _, scales, indices = compressor.layout(shard).fields
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    decay, p_clip, residual = residual_arguments(compressor.decay, err, clip)
    sums = partial_sums(err, stats)
    options, num_warps = compress_options(compressor, residual, stats=stats is not None)
    positions = shards * shard_chunks * max(k, options["CAPACITY"])
    arguments = (
        grad,
        err,
        torch.empty(positions, dtype=torch.int16, device=grad.device),
        bodies.view(compressor.value_dtype),
        bodies[:, scales.offset :].view(torch.float32),
        bodies[:, indices.offset :].view(torch.uint8 if compressor.packs_indices else torch.int16),
        nonfinite,
        sums,
        n,
        shard_chunks,
        bodies.stride(0) // 16,
        decay,
        p_clip,
    )
    with launching_on(grad):
        compress_kernel[(triton.cdiv(shard_chunks, options["CHUNKS"]), shards)](
            *arguments, **options, num_warps=num_warps, **EXACT
        )
    if stats is not None:
        finish(sums, stats, compressor.entries(n))


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    from gck.kernels.chunk_topk import gpu_reduce  # whose kernel is made of the helpers above

    gpu_reduce.reduce_(compressor, job)
