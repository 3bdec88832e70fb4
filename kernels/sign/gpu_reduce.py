"""Packed signs of all ranks to those of their sum: one pass.

A program owns whole chunks; the sum stays in registers and is packed as an accumulated gradient is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl

from gck.kernels.common.division import divided, division
from gck.kernels.common.keys import accumulate, canonical
from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.quads import quad_column, quad_offsets
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import ABSENT, read_residual, reduction_arguments
from gck.kernels.common.tiles import load_tile
from gck.kernels.sign.gpu import WARP_ELEMENTS, encode_group, encode_options
from gck.kernels.sign.gpu_decode import TOGETHER, add_signs

REGISTERS: int | None = 128  # a thread: what groups need that the vector's end does not cut short


@triton.jit
def _reduce_group(
    p_err,
    p_from_words,
    p_from_scales,
    p_words,
    p_scales,
    p_nonfinite,
    base,
    n,
    ranks,
    row_units,
    number,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The CHUNKS chunks of 2**LEVELS elements from `base` on, as far as n."""
    CHUNK: tl.constexpr = 2**LEVELS
    QUADS: tl.constexpr = CHUNKS * CHUNK // 4
    left = tl.minimum(n - base, CHUNKS * CHUNK).to(tl.int32)
    b_quad = quad_column(QUADS)
    b_offset = quad_offsets(b_quad)
    if RESIDUAL != ABSENT:
        b_err = read_residual(load_tile(p_err + base, b_offset, left, WHOLE), decay, p_clip, RESIDUAL)
    b_sum = tl.zeros((QUADS, 4), tl.float32)
    fields = (
        p_from_words + base // 32,
        p_from_scales + (base >> LEVELS),
        b_quad,
        left,
        ranks,
        row_units,
        1.0,
    )
    b_sum = add_signs(b_sum, *fields, LEVELS, TOGETHER, WHOLE)
    b_acc = divided(b_sum, number, DIVISION)
    b_acc = accumulate(b_acc, b_err) if RESIDUAL != ABSENT else canonical(b_acc)
    if not WHOLE:
        b_acc = tl.where(b_offset < left, b_acc, 0.0)
    b_acc = tl.reshape(b_acc, (CHUNKS, CHUNK))
    packed = (p_words, p_scales, p_nonfinite)
    encode_group(b_acc, p_err + base, *packed, left, CHUNKS, LEVELS, WHOLE, RESIDUAL != ABSENT)


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def reduce_kernel(
    p_err,
    p_from_words,
    p_from_scales,
    p_words,
    p_scales,
    p_nonfinite,
    n,
    ranks,
    row_units,
    number,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A program owns CHUNKS chunks. Bodies of the ranks are row_units * 16 bytes apart. Without a
    residual, p_err is of no account."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    base = i_chunk * CHUNK
    p_words += i_chunk * (CHUNK // 32)
    p_scales += i_chunk
    given = (p_err, p_from_words, p_from_scales, p_words, p_scales, p_nonfinite)
    sizes = (base, tl.cast(n, tl.int64), ranks, row_units, number, decay, p_clip)
    if base + CHUNKS * CHUNK <= n:
        _reduce_group(*given, *sizes, CHUNKS, LEVELS, DIVISION, RESIDUAL, TOGETHER, True)
    else:
        _reduce_group(*given, *sizes, CHUNKS, LEVELS, DIVISION, RESIDUAL, TOGETHER, False)


def reduce_options(compressor: Any, kind: str, residual: int) -> tuple[dict[str, Any], int, int | None]:
    """(compile-time values, warps, most registers) of `reduce_kernel`."""
    options, num_warps = encode_options(compressor.chunk_size, WARP_ELEMENTS)
    options |= {"DIVISION": kind, "RESIDUAL": residual, "TOGETHER": TOGETHER}
    return options, num_warps, REGISTERS


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    words, scales = job.layout.views(job.bodies[0])
    out_words, out_scales = job.server.layout(job.numel).views(job.body)
    number, kind = division(job.divisor)
    decay, clip, residual = reduction_arguments(job)
    options, num_warps, most = reduce_options(compressor, kind, residual)
    nonfinite = job.nonfinite
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=job.body.device)
    grid = (triton.cdiv(job.numel, options["CHUNKS"] * compressor.chunk_size),)
    with launching_on(job.body):
        reduce_kernel[grid](
            out_scales if job.err is None else job.err,
            words.view(torch.int32),
            scales,
            out_words.view(torch.int32),
            out_scales,
            nonfinite,
            job.numel,
            job.bodies.shape[0],
            job.bodies.stride(0) // 16,
            number,
            decay,
            clip,
            **options,
            num_warps=num_warps,
            **registers(most),
            **EXACT,
        )
