"""Sign with error feedback on the GPU: one pass, a group of whole chunks a program.

The vector is cut into shards, each with a body of its own: row s of `bodies`. The grid is (groups a
shard, shards), so that no program spans two rows and none divides to find its row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.compressor import shard_numel
from gck.kernels.common.gpu_statistics import finish, partial_sums
from gck.kernels.common.keys import accumulate, canonical, is_finite, negated
from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.packing import pack_bits
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import read_residual, residual_arguments
from gck.kernels.common.statistics import sum_read, sum_stored
from gck.kernels.common.tiles import load_tile
from gck.kernels.common.tree import halving_sum
from gck.kernels.sign.gpu_decode import decompress_, decompress_sum_

__all__ = ["compress_", "decompress_", "decompress_sum_", "reduce_"]

WARP_ELEMENTS = 512  # a warp, of chunks that are not larger
# Of larger ones: fewer warps wait for each other in the halving tree, and each has more under way.
MOST_WARP_ELEMENTS = 1024
# Registers a thread, by elements a warp: what whole groups need. The group that the vector's end cuts short
# needs twice as many for its masks, which must not keep other programs from the processor: it spills.
REGISTERS: dict[int, int | None] = {512: 64, 1024: 80, 2048: 168}


@triton.jit
def encode_group(
    b_acc,
    p_err,
    p_words,
    p_scales,
    p_nonfinite,
    left,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    WHOLE: tl.constexpr,
    STORE: tl.constexpr = True,
):
    """Packs b_acc, CHUNKS chunks of 2**LEVELS elements, of which `left` exist, the others zeros. All pointers
    point at the first."""
    CHUNK: tl.constexpr = 2**LEVELS
    WORDS: tl.constexpr = CHUNKS * CHUNK // 32
    b_chunk = tl.arange(0, CHUNKS)
    b_word = tl.arange(0, WORDS)
    b_local = b_chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if WHOLE:
        b_positive = b_acc >= 0
        b_scale = canonical(halving_sum(tl.abs(b_acc), CHUNKS, LEVELS) * (1.0 / CHUNK))
        tl.store(p_words + b_word, pack_bits(b_positive, WORDS))
        tl.store(p_scales + b_chunk, b_scale)
    else:
        b_inside = b_local < left
        b_positive = (b_acc >= 0) & b_inside
        b_valid = tl.minimum(left - b_chunk * CHUNK, CHUNK)
        # A chunk past the end has no elements: any divisor but 0 will do, as nothing is stored.
        b_divisor = tl.maximum(b_valid, 1).to(tl.float32)
        b_scale = canonical(tl.div_rn(halving_sum(tl.abs(b_acc), CHUNKS, LEVELS), b_divisor))
        tl.store(p_words + b_word, pack_bits(b_positive, WORDS), mask=b_word * 32 < left)
        tl.store(p_scales + b_chunk, b_scale, mask=b_valid > 0)
    # The residual of a chunk is finite where its scale is: a non-finite element makes the sum
    # non-finite, and |acc - scale| never exceeds the larger of the two. So one test a chunk is enough.
    b_finite = is_finite(b_scale)
    b_residual = b_acc - tl.where(b_positive, b_scale[:, None], negated(b_scale)[:, None])
    b_residual = tl.where(b_finite[:, None], b_residual, 0.0)
    if WHOLE:
        if STORE:
            tl.store(p_err + b_local, b_residual)
        cleared = tl.sum(tl.where(b_finite, 0, CHUNK), 0)
    else:
        if STORE:
            tl.store(p_err + b_local, b_residual, mask=b_inside)
        cleared = tl.sum(tl.where(b_finite, 0, tl.maximum(b_valid, 0)), 0)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")


@triton.jit
def _compress_group(
    p_grad,
    p_err,
    p_words,
    p_scales,
    p_nonfinite,
    left,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Compresses CHUNKS chunks of 2**LEVELS elements, of which `left` exist, at which all pointers point."""
    CHUNK: tl.constexpr = 2**LEVELS
    b_local = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    b_err = read_residual(load_tile(p_err, b_local, left, WHOLE), decay, p_clip, RESIDUAL)
    b_acc = accumulate(load_tile(p_grad, b_local, left, WHOLE), b_err)
    encode_group(b_acc, p_err, p_words, p_scales, p_nonfinite, left, CHUNKS, LEVELS, WHOLE)


@triton.jit(do_not_specialize=["n", "shard_chunks", "row_units"])
def compress_kernel(
    p_grad,
    p_err,
    p_words,
    p_scales,
    p_nonfinite,
    p_sums,
    n,
    shard_chunks,
    row_units,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """Rows of words and scales are row_units * 16 bytes apart."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_shard = tl.program_id(1).to(tl.int64)
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    base = (i_shard * shard_chunks + i_chunk) * CHUNK
    # The last group of a shard stops at the shard's end: what follows belongs to the next row.
    stop = tl.minimum((i_shard + 1) * shard_chunks * CHUNK, tl.cast(n, tl.int64))
    p_words += i_shard * row_units * 4 + i_chunk * (CHUNK // 32)
    p_scales += i_shard * row_units * 4 + i_chunk
    if STATS:
        sum_read(p_grad, p_err, p_sums, n, base, stop, decay, p_clip, CHUNKS * CHUNK, RESIDUAL)
    left = tl.minimum(stop - base, CHUNKS * CHUNK).to(tl.int32)
    group = (p_grad + base, p_err + base, p_words, p_scales, p_nonfinite, left, decay, p_clip)
    if left == CHUNKS * CHUNK:
        _compress_group(*group, CHUNKS, LEVELS, RESIDUAL, True)
    elif left > 0:
        _compress_group(*group, CHUNKS, LEVELS, RESIDUAL, False)
    if STATS:
        sum_stored(p_err + base, p_sums, n, base, left, False)


def encode_options(chunk: int, part: int) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of a kernel that encodes groups of chunks, `part` elements a warp."""
    chunks = max(part // chunk, 1)
    return {"CHUNKS": chunks, "LEVELS": chunk.bit_length() - 1}, chunks * chunk // part


def compress_options(compressor: Any, *, stats: bool = False) -> tuple[dict[str, Any], int, int | None]:
    """(compile-time values, warps, most registers) of `compress_kernel`."""
    chunk = compressor.chunk_size
    part = MOST_WARP_ELEMENTS if chunk >= MOST_WARP_ELEMENTS else WARP_ELEMENTS
    options, num_warps = encode_options(chunk, part)
    return options, num_warps, None if stats else REGISTERS.get(part)


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    n, chunk, shards = grad.numel(), compressor.chunk_size, bodies.shape[0]
    shard = shard_numel(n, chunk, shards)
    scales_at = compressor.layout(shard).fields[1].offset
    options, num_warps, most = compress_options(compressor, stats=stats is not None)
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    decay, p_clip, residual = residual_arguments(compressor.decay, err, clip)
    sums = partial_sums(err, stats)
    with launching_on(grad):
        compress_kernel[(triton.cdiv(shard, options["CHUNKS"] * chunk), shards)](
            grad,
            err,
            bodies.view(torch.int32),
            bodies[:, scales_at:].view(torch.float32),
            nonfinite,
            sums,
            n,
            triton.cdiv(shard, chunk),
            bodies.stride(0) // 16,
            decay,
            p_clip,
            RESIDUAL=residual,
            STATS=stats is not None,
            **options,
            num_warps=num_warps,
            **registers(most),
            **EXACT,
        )
    if stats is not None:
        finish(sums, stats, n)


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    from gck.kernels.sign import gpu_reduce  # whose kernel is made of the helpers above

    gpu_reduce.reduce_(compressor, job)
