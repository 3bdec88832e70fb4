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
from gck.kernels.common.keys import accumulate, canonical, is_finite
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.packing import pack_bits, unpack_bits
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import read_residual, residual_arguments
from gck.kernels.common.statistics import sum_read, sum_stored
from gck.kernels.common.tiles import load_tile
from gck.kernels.common.tree import halving_sum
from gck.wire import Layout

# Elements a warp of `compress`: up to this chunk size the halving tree never leaves a warp.
WARP_ELEMENTS = 512
TILE = 2048  # elements a program of `decompress`


@triton.jit
def encode_group(
    b_acc,
    p_err,
    p_words,
    p_scales,
    p_nonfinite,
    base,
    stop,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    WHOLE: tl.constexpr,
    STORE: tl.constexpr = True,
):
    """Packs b_acc, the CHUNKS chunks of 2**LEVELS elements from `base` on, zeros from `stop` on."""
    CHUNK: tl.constexpr = 2**LEVELS
    WORDS: tl.constexpr = CHUNKS * CHUNK // 32
    b_chunk = tl.arange(0, CHUNKS)
    b_word = tl.arange(0, WORDS)
    b_offset = base + b_chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if WHOLE:
        b_positive = b_acc >= 0
        b_scale = canonical(halving_sum(tl.abs(b_acc), CHUNKS, LEVELS) * (1.0 / CHUNK))
        tl.store(p_words + b_word, pack_bits(b_positive, WORDS))
        tl.store(p_scales + b_chunk, b_scale)
    else:
        b_inside = b_offset < stop
        b_positive = (b_acc >= 0) & b_inside
        left = (stop - base).to(tl.int32)
        b_valid = tl.minimum(left - b_chunk * CHUNK, CHUNK)
        # A chunk past the end has no elements: any divisor but 0 will do, as nothing is stored.
        b_divisor = tl.maximum(b_valid, 1).to(tl.float32)
        b_scale = canonical(tl.div_rn(halving_sum(tl.abs(b_acc), CHUNKS, LEVELS), b_divisor))
        tl.store(p_words + b_word, pack_bits(b_positive, WORDS), mask=b_word * 32 < left)
        tl.store(p_scales + b_chunk, b_scale, mask=b_valid > 0)
    # The residual of a chunk is finite where its scale is: a non-finite element makes the sum
    # non-finite, and |acc - scale| never exceeds the larger of the two. So one test a chunk is enough.
    b_finite = is_finite(b_scale)
    b_residual = b_acc - tl.where(b_positive, b_scale[:, None], -b_scale[:, None])
    b_residual = tl.where(b_finite[:, None], b_residual, 0.0)
    if WHOLE:
        if STORE:
            tl.store(p_err + b_offset, b_residual)
        cleared = tl.sum(tl.where(b_finite, 0, CHUNK), 0)
    else:
        if STORE:
            tl.store(p_err + b_offset, b_residual, mask=b_inside)
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
    base,
    stop,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Compresses the CHUNKS chunks of 2**LEVELS elements from `base` on, as far as `stop`."""
    CHUNK: tl.constexpr = 2**LEVELS
    b_offset = base + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    b_err = read_residual(load_tile(p_err, b_offset, stop, WHOLE), decay, p_clip, RESIDUAL)
    b_acc = accumulate(load_tile(p_grad, b_offset, stop, WHOLE), b_err)
    encode_group(b_acc, p_err, p_words, p_scales, p_nonfinite, base, stop, CHUNKS, LEVELS, WHOLE)


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
    group = (p_grad, p_err, p_words, p_scales, p_nonfinite, base, stop, decay, p_clip)
    if base + CHUNKS * CHUNK <= stop:
        _compress_group(*group, CHUNKS, LEVELS, RESIDUAL, True)
    elif base < stop:
        _compress_group(*group, CHUNKS, LEVELS, RESIDUAL, False)
    if STATS:
        sum_stored(p_err + base, p_sums, n, base, tl.minimum(stop - base, CHUNKS * CHUNK).to(tl.int32), False)


@triton.jit
def _decompress_tile(
    p_out,
    p_words,
    p_scales,
    first_word,
    n,
    alpha,
    LEVELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_word = first_word + tl.arange(0, TILE // 32)
    b_offset = b_word[:, None] * 32 + tl.arange(0, 32)[None, :]
    if WHOLE:
        b_bits = unpack_bits(tl.load(p_words + b_word))
        b_scale = tl.load(p_scales + (b_word >> (LEVELS - 5)))
    else:
        b_bits = unpack_bits(tl.load(p_words + b_word, mask=b_word * 32 < n, other=0))
        b_scale = tl.load(p_scales + (b_word >> (LEVELS - 5)), mask=b_word * 32 < n, other=0.0)
    b_scaled = b_scale * alpha
    b_value = tl.where(b_bits != 0, b_scaled[:, None], -b_scaled[:, None])
    if WHOLE:
        if ACCUMULATE:
            b_value = tl.load(p_out + b_offset) + b_value
        tl.store(p_out + b_offset, b_value)
    else:
        if ACCUMULATE:
            b_value = tl.load(p_out + b_offset, mask=b_offset < n, other=0.0) + b_value
        tl.store(p_out + b_offset, b_value, mask=b_offset < n)


@triton.jit(do_not_specialize=["n"])
def decompress_kernel(
    p_out,
    p_words,
    p_scales,
    n,
    alpha,
    LEVELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
):
    first_word = tl.program_id(0).to(tl.int64) * (TILE // 32)
    if first_word * 32 + TILE <= n:
        _decompress_tile(p_out, p_words, p_scales, first_word, n, alpha, LEVELS, ACCUMULATE, TILE, True)
    else:
        _decompress_tile(p_out, p_words, p_scales, first_word, n, alpha, LEVELS, ACCUMULATE, TILE, False)


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
    chunks = max(WARP_ELEMENTS // chunk, 1)
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    decay, p_clip, residual = residual_arguments(compressor, err, clip)
    sums = partial_sums(err, stats)
    with launching_on(grad):
        compress_kernel[(triton.cdiv(shard, chunks * chunk), shards)](
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
            CHUNKS=chunks,
            LEVELS=chunk.bit_length() - 1,
            RESIDUAL=residual,
            STATS=stats is not None,
            num_warps=chunks * chunk // WARP_ELEMENTS,
            **EXACT,
        )
    if stats is not None:
        finish(sums, stats, n)


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    words, scales = fields
    with launching_on(out):
        decompress_kernel[(triton.cdiv(out.numel(), TILE),)](
            out,
            words.view(torch.int32),
            scales,
            out.numel(),
            alpha,
            LEVELS=compressor.chunk_size.bit_length() - 1,
            ACCUMULATE=accumulate,
            TILE=TILE,
            num_warps=4,
            **EXACT,
        )


def decompress_sum_(
    compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    from gck.kernels.sign import gpu_sum  # whose kernels are made of the helpers above

    gpu_sum.decompress_sum_(compressor, out, bodies, layout, alpha, accumulate)


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    from gck.kernels.sign import gpu_sum

    gpu_sum.reduce_(compressor, job)
