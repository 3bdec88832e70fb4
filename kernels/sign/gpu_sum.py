"""Packed signs of all ranks to their sum, or to the packed signs of it: one pass.

A thread owns a word's elements and walks the ranks: a word and a scale of several ranks are asked for before
the first of them is used. To pack a sum again, a program owns whole chunks; the sum stays in registers and is
packed as an accumulated gradient is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.division import divided, division
from gck.kernels.common.keys import accumulate, canonical
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.tiles import load_tile
from gck.kernels.sign.gpu import encode_group
from gck.wire import Layout

WARP_ELEMENTS = 1024  # a word for each thread
TILE = 4096  # elements a program of `sum_kernel`
TOGETHER = 2  # ranks whose words are under way at the same time


@triton.jit
def _sum_words(
    b_sum,
    p_words,
    p_scales,
    first_word,
    n,
    ranks,
    row_units,
    alpha,
    LEVELS: tl.constexpr,
    WORDS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """b_sum, (32, WORDS), a word's elements in a column, and what the ranks have there, in their order."""
    b_word = first_word + tl.arange(0, WORDS)
    b_place = tl.arange(0, 32)[:, None]
    for first in range(0, ranks, TOGETHER):
        for i in tl.static_range(TOGETHER):
            # Past the last rank, and past n, all is read as 0: then elements are -0, which changes no sum.
            b_live = b_word * 32 < tl.where(first + i < ranks, tl.cast(n, tl.int64), 0)
            i_row = tl.cast(first + i, tl.int64) * row_units * 4
            b_bits = tl.load(p_words + i_row + b_word, mask=b_live, other=0)
            b_scale = tl.load(p_scales + i_row + (b_word >> (LEVELS - 5)), mask=b_live, other=0.0) * alpha
            b_positive = ((b_bits[None, :] >> b_place) & 1) != 0
            b_sum += tl.where(b_positive, b_scale[None, :], -b_scale[None, :])
    return b_sum


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def sum_kernel(
    p_out,
    p_words,
    p_scales,
    n,
    ranks,
    row_units,
    alpha,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    CLEAR: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A program owns TILE elements. Bodies are row_units * 16 bytes apart. CLEAR: from zero, not from out."""
    WORDS: tl.constexpr = TILE // 32
    first_word = tl.program_id(0).to(tl.int64) * WORDS
    b_offset = (first_word + tl.arange(0, WORDS)[:, None]) * 32 + tl.arange(0, 32)[None, :]
    whole = first_word * 32 + TILE <= n
    if CLEAR:
        b_sum = tl.zeros((32, WORDS), tl.float32)
    elif whole:
        b_sum = tl.trans(tl.load(p_out + b_offset))
    else:
        b_sum = tl.trans(tl.load(p_out + b_offset, mask=b_offset < n, other=0.0))
    fields = (p_words, p_scales, first_word, n, ranks, row_units, alpha)
    b_sum = tl.trans(_sum_words(b_sum, *fields, LEVELS, WORDS, TOGETHER))
    if whole:
        tl.store(p_out + b_offset, b_sum)
    else:
        tl.store(p_out + b_offset, b_sum, mask=b_offset < n)


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
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIVISION: tl.constexpr,
    STORE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The CHUNKS chunks of 2**LEVELS elements from `base` on, as far as n."""
    CHUNK: tl.constexpr = 2**LEVELS
    WORDS: tl.constexpr = CHUNKS * CHUNK // 32
    b_offset = base + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if STORE:
        b_err = load_tile(p_err, b_offset, n, WHOLE)
    b_sum = tl.zeros((32, WORDS), tl.float32)
    fields = (p_from_words, p_from_scales, base // 32, n, ranks, row_units, 1.0)
    b_sum = _sum_words(b_sum, *fields, LEVELS, WORDS, TOGETHER)
    b_acc = tl.reshape(tl.trans(divided(b_sum, number, DIVISION)), (CHUNKS, CHUNK))
    b_acc = accumulate(b_acc, b_err) if STORE else canonical(b_acc)
    if not WHOLE:
        b_acc = tl.where(b_offset < n, b_acc, 0.0)
    encode_group(b_acc, p_err, p_words, p_scales, p_nonfinite, base, n, CHUNKS, LEVELS, WHOLE, STORE)


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
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIVISION: tl.constexpr,
    STORE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A program owns CHUNKS chunks. Bodies of the ranks are row_units * 16 bytes apart. Without STORE,
    p_err is of no account."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    base = i_chunk * CHUNK
    p_words += i_chunk * (CHUNK // 32)
    p_scales += i_chunk
    given = (p_err, p_from_words, p_from_scales, p_words, p_scales, p_nonfinite)
    sizes = (base, tl.cast(n, tl.int64), ranks, row_units, number)
    if base + CHUNKS * CHUNK <= n:
        _reduce_group(*given, *sizes, CHUNKS, LEVELS, DIVISION, STORE, TOGETHER, True)
    else:
        _reduce_group(*given, *sizes, CHUNKS, LEVELS, DIVISION, STORE, TOGETHER, False)


def sum_options(compressor: Any, *, clear: bool) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `sum_kernel`."""
    levels = compressor.chunk_size.bit_length() - 1
    return {"LEVELS": levels, "TILE": TILE, "CLEAR": clear, "TOGETHER": TOGETHER}, TILE // WARP_ELEMENTS


def reduce_options(compressor: Any, kind: str, *, residual: bool) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `reduce_kernel`."""
    chunk = compressor.chunk_size
    chunks = max(WARP_ELEMENTS // chunk, 1)
    options = {
        "CHUNKS": chunks,
        "LEVELS": chunk.bit_length() - 1,
        "DIVISION": kind,
        "STORE": residual,
        "TOGETHER": TOGETHER,
    }
    return options, chunks * chunk // WARP_ELEMENTS


def decompress_sum_(
    compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    words, scales = layout.views(bodies[0])
    options, num_warps = sum_options(compressor, clear=not accumulate)
    with launching_on(out):
        sum_kernel[(triton.cdiv(out.numel(), TILE),)](
            out,
            words.view(torch.int32),
            scales,
            out.numel(),
            bodies.shape[0],
            bodies.stride(0) // 16,
            alpha,
            **options,
            num_warps=num_warps,
            **EXACT,
        )


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    words, scales = job.layout.views(job.bodies[0])
    out_words, out_scales = job.server.layout(job.numel).views(job.body)
    number, kind = division(job.divisor)
    options, num_warps = reduce_options(compressor, kind, residual=job.err is not None)
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
            **options,
            num_warps=num_warps,
            **EXACT,
        )
