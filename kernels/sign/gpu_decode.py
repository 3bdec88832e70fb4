"""Packed signs to a dense vector: those of one rank, or the sum of all ranks'.

Words and scales of several ranks are asked for before the first of them is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import negated
from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.quads import bits_of, quad_column, quad_offsets
from gck.kernels.common.tiles import load_tile
from gck.wire import Layout

TILE = 2048  # elements a program
WARPS = 4
# Registers a thread, of several ranks' and of one's: what whole tiles need. The last tile spills.
REGISTERS: int | None = 128
ONE_REGISTERS: int | None = 48
TOGETHER = 8  # ranks whose words are under way at the same time


@triton.jit
def _load_quads(p_words, p_scales, b_quad, left, LEVELS: tl.constexpr, WHOLE: tl.constexpr):
    """(words whose low 4 bits are the signs, scales) of quads; past `left` elements both are 0."""
    p_word, p_scale = p_words + (b_quad >> 3), p_scales + (b_quad >> (LEVELS - 2))
    if WHOLE:
        b_word, b_scale = tl.load(p_word), tl.load(p_scale)
    else:
        b_live = b_quad * 4 < left
        b_word = tl.load(p_word, mask=b_live, other=0)
        b_scale = tl.load(p_scale, mask=b_live, other=0.0)
    return b_word >> ((b_quad & 7) * 4), b_scale


@triton.jit
def _signed(b_word, b_scale, alpha):
    b_scale *= alpha
    return tl.where(bits_of(b_word, 0, 1), b_scale, negated(b_scale))


@triton.jit
def _add_ranks(
    b_sum,
    p_words,
    p_scales,
    b_quad,
    left,
    row_units,
    alpha,
    LEVELS: tl.constexpr,
    RANKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    loaded = ()
    for i in tl.static_range(RANKS):
        i_row = tl.cast(row_units, tl.int64) * (4 * i)
        loaded += (_load_quads(p_words + i_row, p_scales + i_row, b_quad, left, LEVELS, WHOLE),)
    for i in tl.static_range(RANKS):
        b_sum += _signed(loaded[i][0], loaded[i][1], alpha)
    return b_sum


@triton.jit
def add_signs(
    b_sum,
    p_words,
    p_scales,
    b_quad,
    left,
    ranks,
    row_units,
    alpha,
    LEVELS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """b_sum, (QUADS, 4), and what the ranks have there, in their order."""
    # Masks take the registers that ranks need to be under way together; few programs have any.
    RANKS: tl.constexpr = TOGETHER if WHOLE else 1
    step = tl.cast(row_units, tl.int64) * 4
    for _ in range(ranks // RANKS):
        b_sum = _add_ranks(b_sum, p_words, p_scales, b_quad, left, row_units, alpha, LEVELS, RANKS, WHOLE)
        p_words += step * RANKS
        p_scales += step * RANKS
    for _ in range(ranks % RANKS):
        b_sum = _add_ranks(b_sum, p_words, p_scales, b_quad, left, row_units, alpha, LEVELS, 1, WHOLE)
        p_words += step
        p_scales += step
    return b_sum


@triton.jit
def _decompress_tile(
    p_out,
    p_words,
    p_scales,
    left,
    ranks,
    row_units,
    alpha,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    CLEAR: tl.constexpr,
    ADD: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_quad = quad_column(TILE // 4)
    b_offset = quad_offsets(b_quad)
    if ADD:
        b_sum = tl.zeros((TILE // 4, 4), tl.float32) if CLEAR else load_tile(p_out, b_offset, left, WHOLE)
        fields = (p_words, p_scales, b_quad, left, ranks, row_units, alpha)
        b_sum = add_signs(b_sum, *fields, LEVELS, TOGETHER, WHOLE)
    else:
        b_word, b_scale = _load_quads(p_words, p_scales, b_quad, left, LEVELS, WHOLE)
        b_sum = _signed(b_word, b_scale, alpha)
    if WHOLE:
        tl.store(p_out + b_offset, b_sum)
    else:
        tl.store(p_out + b_offset, b_sum, mask=b_offset < left)


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def decompress_kernel(
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
    ADD: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A program owns TILE elements and walks the bodies of all ranks, row_units * 16 bytes apart, in order.
    CLEAR: from zero; ADD: decoded values are added, else those of one rank are written."""
    base = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(tl.cast(n, tl.int64) - base, TILE).to(tl.int32)
    given = (p_out + base, p_words + base // 32, p_scales + (base >> LEVELS), left, ranks, row_units, alpha)
    if left == TILE:
        _decompress_tile(*given, LEVELS, TILE, CLEAR, ADD, TOGETHER, True)
    else:
        _decompress_tile(*given, LEVELS, TILE, CLEAR, ADD, TOGETHER, False)


def decompress_options(
    compressor: Any, *, clear: bool, add: bool, ranks: int
) -> tuple[dict[str, Any], int, int | None]:
    """(compile-time values, warps, most registers) of `decompress_kernel`."""
    options = {
        "LEVELS": compressor.chunk_size.bit_length() - 1,
        "TILE": TILE,
        "CLEAR": clear,
        "ADD": add,
        "TOGETHER": TOGETHER if ranks > 1 else 1,
    }
    return options, WARPS, REGISTERS if ranks > 1 else ONE_REGISTERS


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    _decompress(compressor, out, fields, 1, 0, alpha, clear=False, add=accumulate)


def decompress_sum_(
    compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    fields = layout.views(bodies[0])
    ranks, row_units = bodies.shape[0], bodies.stride(0) // 16
    _decompress(compressor, out, fields, ranks, row_units, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Any,
    out: Tensor,
    fields: tuple[Tensor, ...],
    ranks: int,
    row_units: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    words, scales = fields
    options, num_warps, most = decompress_options(compressor, clear=clear, add=add, ranks=ranks)
    with launching_on(out):
        decompress_kernel[(triton.cdiv(out.numel(), TILE),)](
            out,
            words.view(torch.int32),
            scales,
            out.numel(),
            ranks,
            row_units,
            alpha,
            **options,
            num_warps=num_warps,
            **registers(most),
            **EXACT,
        )
