"""Exact top-k with error feedback on the GPU: guess, stream, refine, emit.

`sample` and `guess` find a low threshold; `stream` reads grad and err once, writes acc = grad + err to err,
and moves what reaches the threshold to a list; `restore` puts the list back where it was no help; `refine`
counts keys digit by digit, most significant first, which gives the exact key of the k-th largest element;
`count` finds how many winners each run of tiles holds, and `emit` writes them in order, and to err what
they and the losers leave there.

Grids follow from the number of elements alone. Every decision is taken on the device (see `gpu_control`), and
each kernel that has nothing to do in the mode it finds ends at once. Atomic additions of integers place
and count; no result depends on their order, because a tile's candidates are in order, and tiles are read in
the order of the vector.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.launch import EXACT, launching_on, most_programs
from gck.kernels.topk import gpu_control, gpu_guess
from gck.kernels.topk.gpu_control import (
    BINS,
    DIGITS,
    KNOWN,
    LIST,
    LISTED,
    NONFINITE,
    QUOTA,
    THRESHOLD,
    decide,
    last_decision,
    mode_of,
    note,
)
from gck.kernels.topk.gpu_decode import decompress_, decompress_sum_
from gck.kernels.topk.gpu_guess import (
    BIN_SHIFT,
    BLOCK_LINES,
    GUESS_BLOCK,
    GUESS_WARPS,
    LINE,
    SAMPLE_BINS,
    guess_by_hint,
    guess_by_sample,
    hinted,
    place_of_line,
    sample_block,
)
from gck.kernels.topk.gpu_lists import compress_flat_, compress_list_
from gck.kernels.topk.gpu_select import (
    BLOCK,
    GROUP,
    REFINE_WARPS,
    ROWS,
    RUN_WARPS,
    count_run,
    emit_run,
    refine_part,
)
from gck.kernels.topk.gpu_stream import STREAM_WARPS, TILE, restore_run, stream_tile

__all__ = ["compress_", "compress_flat_", "compress_list_", "decompress_", "decompress_sum_"]

LONG_RUNS_FROM = 4096  # tiles from which a run is ROWS of them, for there are programs enough


@triton.jit(do_not_specialize=["n", "lines", "stride"])
def sample_kernel(
    p_grad,
    p_err,
    p_keys,
    p_bins,
    p_hint,
    n,
    lines,
    stride,
    HINT: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    if hinted(p_hint, HINT) <= 0:
        first = tl.program_id(0) * BLOCK
        b_line = first + tl.arange(0, BLOCK)
        b_at = place_of_line(b_line, stride) * LINE
        b_length = tl.where(b_line < lines, LINE, 0)
        sample_block(p_grad + b_at, p_err + b_at, b_length, p_keys + first * LINE, p_bins, BLOCK, LINE, SHIFT)


@triton.jit(do_not_specialize=["n", "capacity", "lines"])
def guess_kernel(
    p_control,
    p_keys,
    p_bins,
    p_hint,
    n,
    density,
    capacity,
    lines,
    HINT: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    hint = hinted(p_hint, HINT)
    if hint > 0:
        guess_by_hint(p_control, hint)
    else:
        guess_by_sample(p_control, p_keys, p_bins, lines, n, density, capacity, BINS, SHIFT, BLOCK, LINE)


@triton.jit(do_not_specialize=["n", "capacity", "first_tile"])
def stream_kernel(
    p_grad,
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_control,
    n,
    capacity,
    first_tile,
    TILE: tl.constexpr,
    LISTING: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile a program, from first_tile on; all of them are WHOLE, or any may be the last.

    The many whole tiles take fewer registers when the last one is left to a launch of its own.
    """
    i_tile = first_tile + tl.program_id(0)
    if WHOLE:
        stream_tile(
            *(p_grad, p_err, p_list, p_locals, p_tile, p_control, i_tile, TILE, True, 0, capacity),
            *(TILE, LISTING),
        )
    else:
        left = tl.minimum(n - i_tile.to(tl.int64) * TILE, TILE).to(tl.int32)
        stream_tile(
            *(p_grad, p_err, p_list, p_locals, p_tile, p_control, i_tile, left, left == TILE, 0, capacity),
            *(TILE, LISTING),
        )


@triton.jit(do_not_specialize=["k", "capacity", "tiles", "run_tiles"])
def restore_kernel(
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_control,
    k,
    capacity,
    tiles,
    run_tiles,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if mode_of(p_control, k, capacity) != LIST:
        first = tl.program_id(0) * run_tiles
        count = tl.minimum(tiles - first, run_tiles)
        restore_run(p_err, p_list, p_locals, p_tile, first, count, TILE, ROWS, BLOCK)


@triton.jit(do_not_specialize=["n", "k", "capacity"])
def refine_kernel(
    p_err,
    p_list,
    p_control,
    n,
    k,
    capacity,
    DIGIT: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts digit DIGIT, the BITS bits from SHIFT on, of the keys that begin with the prefix so far."""
    mode = mode_of(p_control, k, capacity)
    if mode != KNOWN:
        i_program = tl.program_id(0)
        prefix = tl.cast(0, tl.int32)
        if DIGIT > 0:
            prefix, wanted = decide(p_control, k, DIGIT - 1, LAST_SHIFT, BINS)
            if i_program == 0:
                note(p_control, prefix, wanted, DIGIT - 1)
        p_source = p_err
        length = tl.cast(n, tl.int64)
        if mode == LIST:
            p_source = p_list
            length = tl.load(p_control + LISTED)
        refine_part(
            p_source,
            p_control,
            length,
            i_program,
            tl.num_programs(0),
            prefix,
            DIGIT,
            SHIFT,
            BITS,
            TILE,
            BINS,
        )


@triton.jit(do_not_specialize=["n", "k", "capacity", "tiles", "run_tiles"])
def count_kernel(
    p_err,
    p_list,
    p_tile,
    p_rows,
    p_runs,
    p_groups,
    p_control,
    n,
    k,
    capacity,
    tiles,
    run_tiles,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Takes the last decision; counts what lies above it and ties with it."""
    i_run = tl.program_id(0)
    mode = mode_of(p_control, k, capacity)
    threshold, quota = last_decision(p_control, k, mode, DIGIT, SHIFT, BINS)
    if i_run == 0:
        note(p_control, threshold, quota, DIGIT)
    first = i_run * run_tiles
    stop = tl.minimum(first + run_tiles, tiles)
    count_run(
        *(p_list, p_err, p_tile, p_rows, p_runs, p_groups, i_run, first, stop, run_tiles, n),
        *(mode == LIST, threshold, TILE, ROWS, BLOCK, GROUP),
    )


@triton.jit(do_not_specialize=["n", "k", "capacity", "tiles", "run_tiles"])
def emit_kernel(
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_rows,
    p_runs,
    p_groups,
    p_control,
    p_values,
    p_indices,
    p_nonfinite,
    p_hint,
    n,
    k,
    capacity,
    tiles,
    run_tiles,
    HINT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the winners in order of index, and what they and the losers leave behind to err."""
    i_run = tl.program_id(0)
    in_list = mode_of(p_control, k, capacity) == LIST
    threshold = tl.load(p_control + THRESHOLD).to(tl.int32)
    quota = tl.load(p_control + QUOTA)
    if HINT and i_run == 0:
        tl.store(p_hint, threshold)
    first = i_run * run_tiles
    stop = tl.minimum(first + run_tiles, tiles)
    emit_run(
        *(p_list, p_locals, p_err, p_tile, p_rows, p_runs, p_groups, p_values, p_indices, p_nonfinite),
        *(i_run, first, stop, run_tiles, n, 0, in_list, threshold, quota, TILE, ROWS, BLOCK, GROUP),
    )


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
) -> None:
    """See `kernels.common.base`.

    Args:
        hint: (1,) int32, the key (bits of |x|) of the threshold of the last step, or 0: there is none.
            Spares the sample, and is set to this step's. It never changes the result.
    """
    n = grad.numel()
    values, indices = compressor.layout(n).views(bodies.view(-1))
    k = values.numel()
    tiles = triton.cdiv(n, TILE)
    run_tiles = ROWS if tiles >= LONG_RUNS_FROM else 1
    runs = triton.cdiv(tiles, run_tiles)
    groups = triton.cdiv(runs, GROUP)
    listing = gpu_guess.listing(n, k)
    capacity = gpu_guess.list_capacity(n, k) if listing else 0
    lines = gpu_guess.sample_lines(n) if listing else 0
    blocks = gpu_guess.sample_blocks(lines)

    def scratch(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=grad.device)

    bins_at = gpu_control.WORDS + 2 * groups
    control = torch.zeros(bins_at + listing * SAMPLE_BINS // 2, dtype=torch.int64, device=grad.device)
    group_counts, bins = control[gpu_control.WORDS :], control[bins_at:].view(torch.int32)
    keys = scratch(blocks * BLOCK_LINES * LINE, torch.int32)
    list_, locals_ = scratch(capacity, torch.float32), scratch(capacity, torch.int16)
    tile_words = scratch(tiles * listing)
    rows, run_counts = scratch(runs * ROWS, torch.int32), scratch(2 * runs)
    if nonfinite is None:
        nonfinite = control[NONFINITE.value :]
    hinting = {"HINT": hint is not None}
    p_hint = control if hint is None else hint
    line = {"LINE": LINE, "SHIFT": BIN_SHIFT, **EXACT}
    run = {"TILE": TILE, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": RUN_WARPS, **EXACT}
    sizes = (n, k, capacity, tiles, run_tiles)
    with launching_on(grad):
        if listing:
            sample_kernel[(blocks,)](
                *(grad, err, keys, bins, p_hint, n, lines, n // LINE // lines),
                **(hinting | line),
                BLOCK=BLOCK_LINES,
                num_warps=4,
            )
            guess_kernel[(1,)](
                *(control, keys, bins, p_hint, n, k / n, capacity, blocks * BLOCK_LINES),
                **(hinting | line),
                BINS=SAMPLE_BINS,
                BLOCK=GUESS_BLOCK,
                num_warps=GUESS_WARPS,
            )
        whole = n // TILE if listing else 0
        for first, count in ((0, whole), (whole, tiles - whole)):
            if count:
                stream_kernel[(count,)](
                    *(grad, err, list_, locals_, tile_words, control, n, capacity, first),
                    TILE=TILE,
                    LISTING=listing,
                    WHOLE=first < whole,
                    num_warps=STREAM_WARPS,
                    **EXACT,
                )
        if listing:
            restore_kernel[(runs,)](
                err, list_, locals_, tile_words, control, k, capacity, tiles, run_tiles, **run
            )
        refining = (min(tiles, most_programs(grad)),)
        for digit, (shift, bits) in enumerate(DIGITS):
            refine_kernel[refining](
                *(err, list_, control, n, k, capacity),
                DIGIT=digit,
                LAST_SHIFT=DIGITS[max(digit - 1, 0)][0],
                SHIFT=shift,
                BITS=bits,
                TILE=TILE,
                BINS=BINS,
                num_warps=REFINE_WARPS,
                **EXACT,
            )
        count_kernel[(runs,)](
            *(err, list_, tile_words, rows, run_counts, group_counts, control, *sizes),
            DIGIT=len(DIGITS) - 1,
            SHIFT=DIGITS[-1][0],
            BINS=BINS,
            GROUP=GROUP,
            **run,
        )
        emit_kernel[(runs,)](
            *(err, list_, locals_, tile_words, rows, run_counts, group_counts, control),
            *(values, indices, nonfinite, p_hint, *sizes),
            GROUP=GROUP,
            **(hinting | run),
        )
