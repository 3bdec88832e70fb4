"""The kernels of a single vector's top-k after the guess: stream, refine, emit. See `gpu`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY
from gck.kernels.common.statistics import sum_read
from gck.kernels.topk.gpu_control import (
    ARRIVED,
    BRACKET_BITS,
    BRACKET_STOP,
    CLUSTERED,
    EXPECTED,
    GUESS,
    KNOWN,
    LAST_KEY,
    LIST,
    LONG_TILES,
    QUOTA,
    THRESHOLD,
    TIE,
    arrive,
    counted,
    mode_by,
)
from gck.kernels.topk.gpu_count import count_listed, count_scanned, note_long_tiles
from gck.kernels.topk.gpu_emit import EMIT_WIDE, emit_listed, emit_long_tiles, emit_scanned
from gck.kernels.topk.gpu_pick import pick_threshold
from gck.kernels.topk.gpu_refine import (
    ALL_BITS,
    COUNT,
    LONG_SOURCE,
    RESTORE,
    TOGETHER,
    bits_from,
    count_level,
    narrow,
    restore_tiles,
    wait_for_all,
)
from gck.kernels.topk.gpu_stream import TILE_WORDS, key_as_number, stream_tile


@triton.jit(do_not_specialize=["n", "capacity", "bracket_capacity", "first_tile"])
def stream_kernel(
    p_grad,
    p_err,
    p_list,
    p_locals,
    p_bracket,
    p_tile,
    p_control,
    n,
    capacity,
    bracket_capacity,
    first_tile,
    decay,
    p_clip,
    p_sums,
    TILE: tl.constexpr,
    LISTING: tl.constexpr,
    BRACKET: tl.constexpr,
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
        *(p_grad, p_err, p_list, p_locals, p_bracket, p_tile, p_control, i_tile, left, left == TILE),
        *(0, capacity, TILE, LISTING, decay, p_clip, RESIDUAL, FOURS),
        *(BRACKET, bracket_capacity),
    )


@triton.jit(do_not_specialize=["n", "k", "capacity", "bracket_capacity", "tiles", "runs", "long", "step"])
def refine_kernel(
    p_err,
    p_list,
    p_locals,
    p_bracket,
    p_tile,
    p_rows,
    p_groups,
    p_control,
    p_near,
    n,
    k,
    capacity,
    bracket_capacity,
    tiles,
    runs,
    long,
    step,
    LISTING: tl.constexpr,
    BRACKET: tl.constexpr,
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
    # All of it is asked for at once.
    listed, ties, close = counted(p_control, BRACKET)
    guess = tl.load(p_control + GUESS).to(tl.int32)
    stop_key = tl.load(p_control + BRACKET_STOP).to(tl.int32)
    bits = tl.load(p_control + BRACKET_BITS).to(tl.int32)
    clustered = tl.load(p_control + CLUSTERED) > 0
    mode = mode_by(listed, ties, k, capacity)
    times = tl.cast(0, tl.int32)
    p_long = p_tile + tl.cast(tiles, tl.int64) * TILE_WORDS
    if LISTING and ((mode != LIST) | clustered):
        if together | (step == RESTORE):
            if mode == LIST:
                note_long_tiles(p_tile, p_long, p_control, tiles, long)
            else:
                restore_tiles(p_err, p_list, p_locals, p_tile, tiles, TILE, BRACKET)
        if together:
            times += 1
            wait_for_all(p_control, times)

    p_source = p_list
    in_bracket = False
    total = listed
    length = listed
    wanted = tl.cast(k, tl.int64)
    first_key = guess
    found = mode == KNOWN
    if mode == LIST:
        # In the bracket's own list, unless it is too long, or ends above the k-th key.
        if (close <= bracket_capacity) & (listed - close < k):
            p_source = p_bracket
            in_bracket = True
            total = close
            length = close
            wanted -= listed - close
    elif found:
        wanted -= listed
        first_key = tl.load(p_control + TIE).to(tl.int32) - 1
        bits = tl.cast(0, tl.int32)
    else:
        p_source = p_err
        length = tl.cast(n, tl.int64)
        stop_key = tl.cast(LAST_KEY, tl.int32)
        bits = tl.cast(ALL_BITS, tl.int32)
        if listed >= k:  # the list overflowed: the k-th key reaches the guess
            bits = bits_from(first_key)
        else:
            total = tl.cast(n, tl.int64)
            first_key = tl.cast(0, tl.int32)

    level = tl.cast(0, tl.int32)
    going = together | (step > RESTORE)
    while going & (found == 0):
        if together | (step == level + 1):
            interval = (first_key, stop_key, bits)
            if length < LONG_SOURCE:
                count_level(p_source, p_control, level, length, *interval, LEVEL_TILE, BINS)
            else:
                count_level(p_source, p_control, level, length, *interval, TILE, BINS)
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
        apart_key = tl.where(apart, first_key, LAST_KEY)
        to = (p_rows, p_groups, p_control, p_near, first_key, stop_key, apart_key)
        if mode == LIST:
            source = (p_source, in_bracket, p_tile, p_long)
            those = (tiles, runs, clustered, long)
            count_listed(*source, *to, *those, TILE, ROWS, BLOCK, GROUP, ROOM, BRACKET)
        else:
            count_scanned(p_err, *to, tiles, n, TILE, GROUP, ROOM)
        if arrive(p_control + ARRIVED):
            if apart:
                pick_threshold(
                    *(p_rows, p_groups, p_control, p_near, first_key, stop_key, total, wanted, GROUP, ROOM)
                )
            else:
                tl.store(p_control + THRESHOLD, first_key.to(tl.int64))
                tl.store(p_control + QUOTA, wanted)


@triton.jit(do_not_specialize=["n", "k", "capacity", "tiles", "long"])
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
    long,
    BRACKET: tl.constexpr,
    HINT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the winners in order of index, and what they and the losers leave behind to err."""
    i_run = tl.program_id(0)
    listed, ties, _close = counted(p_control, BRACKET)
    in_list = mode_by(listed, ties, k, capacity) == LIST
    threshold = tl.load(p_control + THRESHOLD).to(tl.int32)
    quota = tl.load(p_control + QUOTA)
    if HINT and i_run == 0:
        tl.store(p_hint, threshold)
    to = (p_rows, p_groups, p_values, p_indices, p_nonfinite)
    if in_list:
        expected = key_as_number(p_control + EXPECTED)
        clustered = tl.load(p_control + CLUSTERED) > 0
        source = (p_list, p_locals, p_err, p_tile)
        first = i_run * ROWS
        run = (i_run, first, tiles, 0, threshold, quota, expected, tl.where(clustered, long, TILE))
        emit_listed(*source, *to, *run, TILE, ROWS, BLOCK, GROUP, BRACKET)
        if clustered:
            long_tiles = tl.load(p_control + LONG_TILES).to(tl.int32)
            p_long = p_tile + tl.cast(tiles, tl.int64) * TILE_WORDS
            emit_long_tiles(
                *source, p_long, *to, long_tiles, threshold, quota, expected, TILE, GROUP, BRACKET
            )
    else:
        # In turn, for winners may be all together.
        for i_tile in range(i_run, tiles, tl.num_programs(0)):
            if (tl.load(p_rows + i_tile) > 0) | (threshold >= INFINITY):
                emit_scanned(p_err, *to, i_tile, i_tile, 1, n, 0, threshold, quota, TILE, 1, GROUP, EMIT_WIDE)
