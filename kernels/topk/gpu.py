"""Exact top-k with error feedback on the GPU: guess, stream, refine, emit. A kernel each.

`guess` brackets the k-th largest key by a sample; `stream` reads grad and err once, writes acc = grad + err
to err, moves what reaches the guess to a list, and copies what of that lies in the bracket to another;
`refine` finds the exact key and how many winners each tile holds, from the bracket's list, the whole one,
or, where that was no help, from err; `emit` writes the winners in order, and to err what they and the losers
leave there.

Grids follow from the number of elements alone. Every decision is taken on the device (see `gpu_control`), and
nothing waits for the host. Atomic additions of integers place and count; no result depends on their order,
because a tile's candidates are in order, and tiles are read in the order of the vector.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gck.kernels.common.gpu_statistics import finish_sent, partial_sums
from gck.kernels.common.launch import (
    EXACT,
    INTERPRETED_PROGRAMS,
    TOGETHER_LAUNCH,
    TOGETHER_REGISTERS,
    launching_on,
    most_together,
    registers,
)
from gck.kernels.common.residual import residual_arguments
from gck.kernels.topk import coded, gpu_guess
from gck.kernels.topk.gpu_bracket import (
    BRACKET_REGISTERS,
    BRACKET_WARPS,
    CANDIDATES,
    LINES,
    guess_kernel,
    sample_shape,
)
from gck.kernels.topk.gpu_control import (
    BINS,
    MOST_IN_HALF,
    NONFINITE,
    WORDS,
)
from gck.kernels.topk.gpu_decode import decompress_, decompress_sum_
from gck.kernels.topk.gpu_emit import EMIT_REGISTERS, EMIT_WARPS
from gck.kernels.topk.gpu_guess import LINE
from gck.kernels.topk.gpu_kernels import emit_kernel, refine_kernel, stream_kernel
from gck.kernels.topk.gpu_lists import compress_flat_, compress_list_
from gck.kernels.topk.gpu_refine import (
    COUNT,
    LEVEL_TILE,
    NEAR_ROOM,
    RESTORE,
    TOGETHER,
)
from gck.kernels.topk.gpu_select import BLOCK, GROUP, REFINE_WARPS
from gck.kernels.topk.gpu_stream import STREAM_REGISTERS, STREAM_WARPS, TILE, TILE_WORDS

__all__ = ["compress_", "compress_flat_", "compress_list_", "decompress_", "decompress_sum_"]

# Entries of a row at a time, and rows, that fit into the registers of a program: of `refine`, which reads the
# bracket, and of `emit`, which reads the list.
REFINE_SHAPES = {16: 64, 32: 32}
EMIT_SHAPES = {32: 4, 64: 4, 128: 2}
BRACKET_SHARE = 2  # of the list, the part from which to search the bracket by itself would not help
FEWEST_RUNS = 128  # where there are as many tiles: programs for every processor
LONG = 8  # turns of `emit` from which a tile is long: programs share such tiles out anew


class Shape(NamedTuple):
    """Tiles of a run, a row each, and entries of a row at a time."""

    rows: int
    block: int


def sampled_lines(n: int, k: int) -> int:
    """Lines of the sample for k of n elements."""
    return sample_shape(n, k, LINES, CANDIDATES)[0]


def run_shapes(n: int, k: int) -> tuple[Shape, Shape]:
    """The shapes of `refine` and of `emit`.

    A row is a tile, of which as many entries are looked at together as it has in all likelihood: then a
    program is done with a run in one turn. Without a list, tiles are read by themselves.
    """
    if not gpu_guess.listing(n, k):
        return Shape(1, BLOCK), Shape(1, BLOCK)
    expected = k / n * sampled_lines(n, k) * LINE
    of_tile = TILE * k / n / expected  # entries, for each of the sample's
    listed = of_tile * (expected + 5 * expected**0.5 + 8)
    close = min(listed, of_tile * (8 * expected**0.5 + 8))
    for_all = max(1 << (triton.cdiv(n, TILE) // FEWEST_RUNS).bit_length() >> 1, 1)
    return _shape(REFINE_SHAPES, close, for_all), _shape(EMIT_SHAPES, listed, for_all)


def _shape(shapes: dict[int, int], entries: float, most: int) -> Shape:
    block = min(max(triton.next_power_of_2(int(1.2 * entries) + 4), min(shapes)), max(shapes))
    return Shape(min(shapes[block], most), block)


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    """See `kernels.common.base`.

    Args:
        hint: (1,) int32, the key (bits of |x|) of the threshold of the last step, or 0: there is none.
            Spares the sample, and is set to this step's. It never changes the result.
    """
    if not compressor.is_plain:
        options = {"hint": hint, "clip": clip, "stats": stats}
        coded.compress_(compress_, compressor, grad, err, bodies, nonfinite, **options)
        return
    n = grad.numel()
    values, indices = compressor.layout(n).views(bodies.view(-1))
    k = values.numel()
    tiles = triton.cdiv(n, TILE)
    listing = gpu_guess.listing(n, k)
    lines = sampled_lines(n, k) if listing else 0
    capacity = gpu_guess.list_capacity(n, k, lines, LINES) if listing else 0
    bracket_capacity = capacity // BRACKET_SHARE
    shapes = run_shapes(n, k)
    runs = [triton.cdiv(tiles, shape.rows) for shape in shapes]
    rows = max(count * shape.rows for count, shape in zip(runs, shapes, strict=True))
    bracket = {"BRACKET": listing and n < MOST_IN_HALF}
    long = LONG * shapes[1].block if bracket["BRACKET"] else TILE

    def scratch(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=grad.device)

    words = WORDS + 2 * triton.cdiv(rows, GROUP)
    control = torch.zeros(words, dtype=torch.int64, device=grad.device)
    list_, locals_ = scratch(capacity, torch.float32), scratch(capacity, torch.int16)
    bracketed = scratch(bracket_capacity + TILE * listing, torch.float32)
    near = scratch(2 * NEAR_ROOM, torch.int32)
    tile_words = scratch((TILE_WORDS.value + 1) * tiles * listing)  # and the numbers of long tiles
    counts = scratch(rows, torch.int32), control[WORDS:]
    if nonfinite is None:
        nonfinite = control[NONFINITE.value :]
    hinting = {"HINT": hint is not None}
    p_hint = control if hint is None else hint
    decay, p_clip, residual = residual_arguments(compressor.decay, err, clip)
    sums = partial_sums(err, stats)
    with launching_on(grad):
        if listing:
            _, share, candidates = sample_shape(n, k, LINES, CANDIDATES)
            guess_kernel[(triton.cdiv(lines, LINES),)](
                *(grad, err, control, scratch(candidates, torch.int32), p_hint),
                *(n, lines, n // LINE // lines, k / n, capacity, decay, p_clip),
                LINES=LINES,
                LINE=LINE,
                SHARE=share,
                CANDIDATES=candidates,
                RESIDUAL=residual,
                num_warps=BRACKET_WARPS,
                **registers(BRACKET_REGISTERS),
                **hinting,
                **EXACT,
            )
        fours = (tiles if n % 4 == 0 else n // TILE) if listing else 0
        for first, count in ((0, fours), (fours, tiles - fours)):
            if count:
                stream_kernel[(count,)](
                    *(grad, err, list_, locals_, bracketed, tile_words, control, n, capacity),
                    *(bracket_capacity, first, decay, p_clip, sums),
                    TILE=TILE,
                    LISTING=listing,
                    FOURS=first < fours,
                    RESIDUAL=residual,
                    STATS=stats is not None,
                    num_warps=STREAM_WARPS,
                    **registers(STREAM_REGISTERS),
                    **bracket,
                    **EXACT,
                )
        programs = most_together(grad)
        for step in (TOGETHER.value,) if programs else range(RESTORE.value, COUNT.value + 1):
            refine_kernel[(min(tiles, programs or INTERPRETED_PROGRAMS),)](
                *(err, list_, locals_, bracketed, tile_words, *counts, control, near),
                *(n, k, capacity, bracket_capacity, tiles, runs[0], long, step),
                LISTING=listing,
                BINS=BINS,
                LEVEL_TILE=min(LEVEL_TILE, TILE),
                ROOM=NEAR_ROOM,
                num_warps=REFINE_WARPS,
                **(registers(TOGETHER_REGISTERS) | TOGETHER_LAUNCH if programs else {}),
                **_options(shapes[0]),
                **bracket,
            )
        emit_kernel[(runs[1],)](
            *(err, list_, locals_, tile_words, *counts, control),
            *(values, indices, nonfinite, p_hint, n, k, capacity, tiles, long),
            num_warps=EMIT_WARPS,
            **registers(EMIT_REGISTERS),
            **_options(shapes[1]),
            **hinting,
            **bracket,
        )
    if stats is not None:
        finish_sent(sums, stats, values, indices, err)


def _options(shape: Shape) -> dict[str, Any]:
    return {"TILE": TILE, "ROWS": shape.rows, "BLOCK": shape.block, "GROUP": GROUP, **EXACT}
