"""Codes of all ranks to the codes of their sum: one pass, a group of whole chunks a program.

What a program reads, the residual and the codes of several ranks, is all asked for before the first of it is
used. The sum stays in registers and is encoded as an accumulated gradient is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl

from gck.kernels.common.division import divided, division
from gck.kernels.common.keys import accumulate, canonical
from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.philox import key_of
from gck.kernels.common.quads import quad_column, quad_offsets
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import ABSENT, read_residual, reduction_arguments
from gck.kernels.common.tiles import load_tile
from gck.kernels.quantize.gpu import encode_group, encode_options
from gck.kernels.quantize.gpu_decode import TOGETHER, add_codes

# Registers a thread, where a warp has whole chunks that are rounded to nearest, and else: what groups need
# that the vector's end does not cut short. The last one spills.
REGISTERS: int | None = 96
MORE_REGISTERS: int | None = 96


@triton.jit
def _reduce_group(
    p_err,
    p_from_codes,
    p_from_scales,
    p_codes,
    p_scales,
    p_nonfinite,
    base,
    n,
    ranks,
    row_units,
    number,
    key_0,
    key_1,
    first_chunk,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    FROM_BITS: tl.constexpr,
    FROM_TWO_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
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
    p_from_codes += base // 8 * FROM_BITS
    p_from_scales += (base >> LEVELS) * (2 if FROM_TWO_LEVELS else 1)
    fields = (p_from_codes, p_from_scales, b_quad, left, ranks, row_units, 1.0)
    b_sum = tl.zeros((QUADS, 4), tl.float32)
    b_sum = add_codes(b_sum, *fields, LEVELS, FROM_BITS, FROM_TWO_LEVELS, TOGETHER, WHOLE)
    b_acc = divided(b_sum, number, DIVISION)
    b_acc = accumulate(b_acc, b_err) if RESIDUAL != ABSENT else canonical(b_acc)
    if not WHOLE:
        b_acc = tl.where(b_offset < left, b_acc, 0.0)
    b_acc = tl.reshape(b_acc, (CHUNKS, CHUNK))
    first = tl.cast(first_chunk, tl.int64) * CHUNK + base
    group = (p_err + base, p_codes, p_scales, p_nonfinite, left, key_0, key_1, first)
    encode_group(b_acc, *group, CHUNKS, LEVELS, BITS, TWO_LEVELS, STOCHASTIC, WHOLE, RESIDUAL != ABSENT)


@triton.jit(do_not_specialize=["n", "ranks", "row_units", "key_0", "key_1", "first_chunk"])
def reduce_kernel(
    p_err,
    p_from_codes,
    p_from_scales,
    p_codes,
    p_scales,
    p_nonfinite,
    n,
    ranks,
    row_units,
    number,
    key_0,
    key_1,
    first_chunk,
    decay,
    p_clip,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    FROM_BITS: tl.constexpr,
    FROM_TWO_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Bodies of the ranks are row_units * 16 bytes apart. Without a residual p_err is of no account."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    base = i_chunk * CHUNK
    p_codes += i_chunk * (CHUNK * BITS // 8)
    p_scales += i_chunk * (2 if TWO_LEVELS else 1)
    given = (p_err, p_from_codes, p_from_scales, p_codes, p_scales, p_nonfinite)
    sizes = (base, tl.cast(n, tl.int64), ranks, row_units, number, key_0, key_1, first_chunk, decay, p_clip)
    if base + CHUNKS * CHUNK <= n:
        _reduce_group(
            *given,
            *sizes,
            CHUNKS,
            LEVELS,
            FROM_BITS,
            FROM_TWO_LEVELS,
            BITS,
            TWO_LEVELS,
            STOCHASTIC,
            DIVISION,
            RESIDUAL,
            TOGETHER,
            True,
        )
    else:
        _reduce_group(
            *given,
            *sizes,
            CHUNKS,
            LEVELS,
            FROM_BITS,
            FROM_TWO_LEVELS,
            BITS,
            TWO_LEVELS,
            STOCHASTIC,
            DIVISION,
            RESIDUAL,
            TOGETHER,
            False,
        )


def reduce_options(
    compressor: Any, server: Any, kind: str, residual: int
) -> tuple[dict[str, Any], int, int | None]:
    """(compile-time values, warps, most registers) of `reduce_kernel`."""
    options, num_warps = encode_options(server)
    options |= {
        "FROM_BITS": compressor.bits,
        "FROM_TWO_LEVELS": compressor.two_levels,
        "DIVISION": kind,
        "RESIDUAL": residual,
        "TOGETHER": TOGETHER,
    }
    more = options["STOCHASTIC"] or options["TWO_LEVELS"] or num_warps > 1
    return options, num_warps, MORE_REGISTERS if more else REGISTERS


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    codes, scales = job.layout.views(job.bodies[0])
    out_codes, out_scales = job.server.layout(job.numel).views(job.body)
    number, kind = division(job.divisor)
    decay, clip, residual = reduction_arguments(job)
    options, num_warps, most = reduce_options(compressor, job.server, kind, residual)
    nonfinite = job.nonfinite
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=job.body.device)
    grid = (triton.cdiv(job.numel, options["CHUNKS"] * compressor.chunk_size),)
    with launching_on(job.body):
        reduce_kernel[grid](
            out_scales if job.err is None else job.err,
            codes,
            scales,
            out_codes,
            out_scales,
            nonfinite,
            job.numel,
            job.bodies.shape[0],
            job.bodies.stride(0) // 16,
            number,
            *key_of(job.server.key),
            job.server.first // compressor.chunk_size,
            decay,
            clip,
            **options,
            num_warps=num_warps,
            **registers(most),
            **EXACT,
        )
