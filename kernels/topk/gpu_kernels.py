"""The kernels of a single vector's top-k after the guess: stream, refine, emit. See `gpu`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.statistics import sum_read
from gck.kernels.topk.gpu_control import (
    ARRIVED,
    BRACKET_BITS,
    BRACKET_STOP,
    EXPECTED,
    GUESS,
    KNOWN,
    LIST,
    LISTED,
    QUOTA,
    THRESHOLD,
    TIE,
    arrive,
    mode_of,
)
from gck.kernels.topk.gpu_emit import EMIT_SEARCH, emit_listed, emit_scanned
from gck.kernels.topk.gpu_refine import (
    ALL_BITS,
    COUNT,
    LAST_KEY,
    RESTORE,
    SEARCH,
    TOGETHER,
    count_level,
    count_rows,
    narrow,
    pick_threshold,
    restore_runs,
    wait_for_all,
)
from gck.kernels.topk.gpu_stream import key_as_number, stream_tile


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
    decay,
    p_clip,
    p_sums,
    TILE: tl.constexpr,
    LISTING: tl.constexpr,
    FOURS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """A tile a program, from first_tile on. All of them have FOURS of elements, or any may be the last.

    What a vector has beyond its fours is left to a launch of its own, which takes more registers.
    """
    i_tile = first_tile + tl.program_id(0)
    if STATS:
        base = i_tile.to(tl.int64) * TILE
        sum_read(p_grad, p_err, p_sums, n, base, n, decay, p_clip, TILE, RESIDUAL)
    left = tl.minimum(n - i_tile.to(tl.int64) * TILE, TILE).to(tl.int32)
    stream_tile(
        *(p_grad, p_err, p_list, p_locals, p_tile, p_control, i_tile, left, left == TILE, 0, capacity),
        *(TILE, LISTING, decay, p_clip, RESIDUAL, FOURS),
    )


@triton.jit(do_not_specialize=["n", "k", "capacity", "tiles", "runs", "run_tiles", "step"])
def refine_kernel(
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_rows,
    p_groups,
    p_control,
    p_near,
    n,
    k,
    capacity,
    tiles,
    runs,
    run_tiles,
    step,
    LISTING: tl.constexpr,
    TILE: tl.constexpr,
    LEVEL_TILE: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """All steps TOGETHER, or, where programs run one after another and cannot wait, the one asked for."""
    together = step == TOGETHER
    mode = mode_of(p_control, k, capacity)
    times = tl.cast(0, tl.int32)
    if LISTING and mode != LIST:
        if together | (step == RESTORE):
            restore_runs(p_err, p_list, p_locals, p_tile, tiles, runs, run_tiles, TILE, ROWS)
        if together:
            times += 1
            wait_for_all(p_control, times)

    p_source = p_err
    total = tl.cast(n, tl.int64)
    wanted = tl.cast(k, tl.int64)
    first_key = tl.cast(0, tl.int32)
    stop_key = tl.cast(LAST_KEY, tl.int32)
    bits = tl.cast(ALL_BITS, tl.int32)
    if mode == LIST:
        p_source = p_list
        total = tl.load(p_control + LISTED)
        first_key = tl.load(p_control + GUESS).to(tl.int32)
        stop_key = tl.load(p_control + BRACKET_STOP).to(tl.int32)
        bits = tl.load(p_control + BRACKET_BITS).to(tl.int32)
    length = total
    found = mode == KNOWN
    if found:
        wanted -= tl.load(p_control + LISTED)
        first_key = tl.load(p_control + TIE).to(tl.int32) - 1
        bits = tl.cast(0, tl.int32)

    level = tl.cast(0, tl.int32)
    going = together | (step > RESTORE)
    while going & (found == 0):
        if together | (step == level + 1):
            count_level(p_source, p_control, level, length, first_key, stop_key, bits, LEVEL_TILE, BINS)
        if together:
            times += 1
            wait_for_all(p_control, times)
        if step == level + 1:
            going = step < 0
        else:
            total, wanted, first_key, stop_key, bits = narrow(
                p_control, level, total, wanted, first_key, stop_key, bits, BINS
            )
            found = (bits == 0) | ((total <= ROOM) & (bits < ALL_BITS))
            level += 1

    if going & (together | (step == COUNT)):
        stop_key = tl.minimum(first_key.to(tl.int64) + (tl.cast(1, tl.int64) << bits), stop_key).to(tl.int32)
        apart = bits > 0
        rows = (p_list, p_err, p_tile, p_rows, p_groups, p_control, p_near, first_key, stop_key, apart)
        shape = (tiles, runs, run_tiles, n)
        if mode == LIST:
            count_rows(*rows, *shape, True, TILE, ROWS, BLOCK, GROUP, ROOM)
        else:
            count_rows(*rows, *shape, False, TILE, ROWS, SEARCH // ROWS, GROUP, ROOM)
        if arrive(p_control + ARRIVED):
            if apart:
                pick_threshold(
                    *(p_rows, p_groups, p_control, p_near, first_key, stop_key, total, wanted, GROUP, ROOM)
                )
            else:
                tl.store(p_control + THRESHOLD, first_key.to(tl.int64))
                tl.store(p_control + QUOTA, wanted)


@triton.jit(do_not_specialize=["n", "k", "capacity", "tiles", "run_tiles"])
def emit_kernel(
    p_err,
    p_list,
    p_locals,
    p_tile,
    p_rows,
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
    if in_list:
        emit_listed(
            *(p_list, p_locals, p_err, p_tile, p_rows, p_groups, p_values, p_indices, p_nonfinite),
            *(i_run, first, stop, 0, threshold, quota, key_as_number(p_control + EXPECTED)),
            *(TILE, ROWS, BLOCK, GROUP),
        )
    else:
        emit_scanned(
            *(p_err, p_rows, p_groups, p_values, p_indices, p_nonfinite, i_run, first, run_tiles, n),
            *(0, threshold, quota, TILE, ROWS, EMIT_SEARCH // ROWS, GROUP),
        )
