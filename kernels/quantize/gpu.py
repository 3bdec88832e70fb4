"""Quantize with error feedback on the GPU: one pass, a group of whole chunks a program.

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
from gck.kernels.common.codes import scaled_codes, two_level_codes
from gck.kernels.common.gpu_statistics import finish, partial_sums
from gck.kernels.common.keys import accumulate, count_cleared, is_finite, magnitude_key
from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.packing import pack_codes
from gck.kernels.common.philox import key_of, uniform
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import read_residual, residual_arguments
from gck.kernels.common.statistics import sum_read, sum_stored
from gck.kernels.common.tiles import load_tile
from gck.kernels.quantize.gpu_decode import decompress_, decompress_sum_

__all__ = ["compress_", "decompress_", "decompress_sum_", "reduce_"]

# Elements a warp of `compress`: up to this chunk size no reduction leaves a warp.
WARP_ELEMENTS = 512
# Registers a thread: what whole groups need. The group that the vector's end cuts short spills.
REGISTERS: int | None = 64
# Scales from 2^96 on: NaN, infinities and products that overflow are possible.
WILD = tl.constexpr((96 + 127) << 23)


@triton.jit
def encode_group(
    b_acc,
    p_err,
    p_codes,
    p_scales,
    p_nonfinite,
    left,
    key_0,
    key_1,
    first,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    STORE: tl.constexpr = True,
):
    """Codes of b_acc, CHUNKS chunks of 2**LEVELS elements, of which `left` exist, the others zeros. All
    pointers point at the first.

    Random numbers are those of the elements from `first`, int64, on.
    """
    CHUNK: tl.constexpr = 2**LEVELS
    b_chunk = tl.arange(0, CHUNKS)
    b_local = b_chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if WHOLE:
        b_inside = tl.full((CHUNKS, CHUNK), 1, tl.int1)
        b_valid = tl.full((CHUNKS,), CHUNK, tl.int32)
    else:
        b_inside = b_local < left
        b_valid = tl.minimum(tl.maximum(left - b_chunk * CHUNK, 0), CHUNK)
    b_exists = b_valid > 0
    if TWO_LEVELS:
        b_code, b_low, b_high, b_decoded = two_level_codes(b_acc, b_inside, b_valid, LEVELS)
        tl.store(p_scales + 2 * b_chunk, b_low, mask=b_exists)
        tl.store(p_scales + 2 * b_chunk + 1, b_high, mask=b_exists)
        b_top = tl.maximum(magnitude_key(b_low), magnitude_key(b_high))
    else:
        if STOCHASTIC:
            b_uniform = uniform(first, key_0, key_1, CHUNKS, CHUNK)
            b_code, b_scale, b_decoded = scaled_codes(b_acc, b_inside, BITS, b_uniform)
        else:
            b_code, b_scale, b_decoded = scaled_codes(b_acc, b_inside, BITS)
        tl.store(p_scales + b_chunk, b_scale, mask=b_exists)
        b_top = magnitude_key(b_scale)
    b_byte = b_chunk[:, None] * (CHUNK * BITS // 8) + tl.arange(0, CHUNK * BITS // 8)[None, :]
    b_residual = b_acc - b_decoded
    b_cleared = b_inside & (is_finite(b_residual) == 0)
    b_residual = tl.where(b_cleared, 0.0, b_residual)
    if WHOLE:
        tl.store(p_codes + b_byte, pack_codes(b_code, BITS))
        if STORE:
            tl.store(p_err + b_local, b_residual)
    else:
        tl.store(p_codes + b_byte, pack_codes(b_code, BITS), mask=b_byte < (left * BITS + 7) // 8)
        if STORE:
            tl.store(p_err + b_local, b_residual, mask=b_inside)
    # A test a chunk, where one of every element would be a reduction over all of them.
    if tl.max(b_top, 0) >= WILD:
        count_cleared(p_nonfinite, b_cleared)


@triton.jit
def _compress_group(
    p_grad,
    p_err,
    p_codes,
    p_scales,
    p_nonfinite,
    left,
    key_0,
    key_1,
    first,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Compresses CHUNKS chunks of 2**LEVELS elements, of which `left` exist, at which pointers point."""
    CHUNK: tl.constexpr = 2**LEVELS
    b_local = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    b_err = read_residual(load_tile(p_err, b_local, left, WHOLE), decay, p_clip, RESIDUAL)
    b_acc = accumulate(load_tile(p_grad, b_local, left, WHOLE), b_err)
    group = (p_err, p_codes, p_scales, p_nonfinite, left, key_0, key_1, first)
    encode_group(b_acc, *group, CHUNKS, LEVELS, BITS, TWO_LEVELS, STOCHASTIC, WHOLE)


@triton.jit(do_not_specialize=["n", "shard_chunks", "row_units", "key_0", "key_1", "first_chunk"])
def compress_kernel(
    p_grad,
    p_err,
    p_codes,
    p_scales,
    p_nonfinite,
    p_sums,
    n,
    shard_chunks,
    row_units,
    key_0,
    key_1,
    first_chunk,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """Rows of codes and scales are row_units * 16 bytes apart; the key is that of `uniform`."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_shard = tl.program_id(1).to(tl.int64)
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    base = (i_shard * shard_chunks + i_chunk) * CHUNK
    # The last group of a shard stops at the shard's end: what follows belongs to the next row.
    stop = tl.minimum((i_shard + 1) * shard_chunks * CHUNK, tl.cast(n, tl.int64))
    p_codes += i_shard * row_units * 16 + i_chunk * (CHUNK * BITS // 8)
    p_scales += i_shard * row_units * 4 + i_chunk * (2 if TWO_LEVELS else 1)
    if STATS:
        sum_read(p_grad, p_err, p_sums, n, base, stop, decay, p_clip, CHUNKS * CHUNK, RESIDUAL)
    first = tl.cast(first_chunk, tl.int64) * CHUNK + base
    left = tl.minimum(stop - base, CHUNKS * CHUNK).to(tl.int32)
    p_grad += base
    p_err += base
    group = (p_grad, p_err, p_codes, p_scales, p_nonfinite, left, key_0, key_1, first, decay, p_clip)
    if left == CHUNKS * CHUNK:
        _compress_group(*group, CHUNKS, LEVELS, BITS, TWO_LEVELS, STOCHASTIC, RESIDUAL, True)
    elif left > 0:
        _compress_group(*group, CHUNKS, LEVELS, BITS, TWO_LEVELS, STOCHASTIC, RESIDUAL, False)
    if STATS:
        sum_stored(p_err, p_sums, n, base, left, False)


def encode_options(compressor: Any) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of a kernel that encodes groups of chunks."""
    chunk = compressor.chunk_size
    chunks = max(WARP_ELEMENTS // chunk, 1)
    options = {
        "CHUNKS": chunks,
        "LEVELS": chunk.bit_length() - 1,
        "BITS": compressor.bits,
        "TWO_LEVELS": compressor.two_levels,
        "STOCHASTIC": compressor.rounding == "stochastic",
    }
    return options, chunks * chunk // WARP_ELEMENTS


def compress_options(compressor: Any, *, stats: bool = False) -> tuple[dict[str, Any], int, int | None]:
    """(compile-time values, warps, most registers) of `compress_kernel`."""
    options, num_warps = encode_options(compressor)
    return options, num_warps, None if stats or compressor.two_levels else REGISTERS


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
    decay, p_clip, residual = residual_arguments(compressor.decay, err, clip)
    sums = partial_sums(err, stats)
    options, num_warps, most = compress_options(compressor, stats=stats is not None)
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    with launching_on(grad):
        compress_kernel[(triton.cdiv(shard, options["CHUNKS"] * chunk), shards)](
            grad,
            err,
            bodies,
            bodies[:, scales_at:].view(torch.float32),
            nonfinite,
            sums,
            n,
            triton.cdiv(shard, chunk),
            bodies.stride(0) // 16,
            *key_of(compressor.key),
            compressor.first // chunk,
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
    from gck.kernels.quantize import gpu_reduce  # whose kernel is made of the helpers above

    gpu_reduce.reduce_(compressor, job)
