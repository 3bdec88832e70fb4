"""The exact threshold, and how many winners each row has, in one kernel.

The k-th key lies in an interval of keys: the bracket, or all keys. A level of the search counts the
interval's keys in bins, all programs together, and the bin of the k-th is the next level's interval. Once it
has few keys, one pass counts what lies above them by row, and sets them apart, each with its row: the last
program to arrive picks the threshold from them and counts the winners among them. After most guesses that
takes one level and one pass over the bracket's own list; where the list was no help, it is first put back
into err, which is searched instead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, QUIET_NAN, canonical, magnitude_key
from gck.kernels.topk.gpu_control import (
    HISTOGRAMS,
    LAST_KEY,
    LEVELS,
    PASSED,
)
from gck.kernels.topk.gpu_stream import restore_run

NEAR_ROOM = 2048  # keys that are set apart at most, which one program looks through
LEVEL_TILE = 1024  # keys that a program counts at a time: a short list is enough for all programs
LONG_SOURCE = tl.constexpr(1 << 20)  # keys from which it is a whole tile: there are enough for all of them
RESTORED = tl.constexpr(4)  # tiles that are put back together
RESTORED_BLOCK = tl.constexpr(512)  # entries of each at a time
ALL_BITS = tl.constexpr(31)  # tell all keys apart
BIN_BITS = tl.constexpr(8)  # of them, those that a level's bins do
FRACTION_BITS = tl.constexpr(22)  # below which infinity and NaN differ
# Steps of the kernel, for where programs run one after another: a launch each, the levels in between.
TOGETHER, RESTORE, COUNT = tl.constexpr(-1), tl.constexpr(0), tl.constexpr(LEVELS + 1)


@triton.jit
def wait_for_all(p_control, times):
    """Returns when every program of the grid has come here for the `times`-th time.

    All of them must be on the device together: see `common.launch.most_together`.
    """
    tl.debug_barrier()
    wanted = times * tl.num_programs(0)
    passed = tl.atomic_add(p_control + PASSED, 1, sem="acq_rel") + 1
    while passed < wanted:
        passed = tl.atomic_add(p_control + PASSED, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def restore_tiles(p_err, p_list, p_locals, p_tile, tiles, TILE: tl.constexpr, BRACKET: tl.constexpr):
    """Puts the list back into err, this program's share of the tiles."""
    for i_part in range(tl.program_id(0), tl.cdiv(tiles, RESTORED), tl.num_programs(0)):
        first = i_part * RESTORED
        count = tl.minimum(tiles - first, RESTORED)
        restore_run(p_err, p_list, p_locals, p_tile, first, count, TILE, RESTORED, RESTORED_BLOCK, BRACKET)


@triton.jit
def count_level(
    p_source,
    p_control,
    level,
    length,
    first_key,
    stop_key,
    bits,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts the keys of the interval that has first_key, so many bits, and no key from stop_key on."""
    shift = tl.maximum(bits - BIN_BITS, 0)
    b_count = tl.zeros((BINS,), tl.int32)
    tiles = tl.cdiv(tl.cast(length, tl.int64), TILE)
    for i_tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0).to(tl.int64)):
        left = tl.minimum(length - i_tile * TILE, TILE).to(tl.int32)
        b_entry = tl.arange(0, TILE)
        b_valid = b_entry < left
        b_acc = tl.load(p_source + i_tile * TILE + b_entry, mask=b_valid, other=0.0)
        b_key = magnitude_key(canonical(b_acc))
        b_bin = (b_key - first_key) >> shift
        b_inside = b_valid & (b_key >= first_key) & (b_key < stop_key) & (b_bin < BINS)
        b_count += tl.histogram(b_bin & (BINS - 1), BINS, mask=b_inside)
    p_histogram = p_control + HISTOGRAMS + level * BINS + tl.arange(0, BINS)
    tl.atomic_add(p_histogram, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def bits_from(first_key):
    """How many bits tell the keys from this one on apart."""
    bits = tl.cast(0, tl.int32)
    while (LAST_KEY - first_key) >> bits > 0:
        bits += 1
    return bits


@triton.jit
def narrow(p_control, level, total, wanted, first_key, stop_key, bits, BINS: tl.constexpr):
    """The next interval, from what a level counted of `total` keys, the `wanted`-th of which is looked for.

    Returns (its keys, which of them is looked for, first_key, stop_key, bits). Each program finds it by
    itself, from the L2 cache, where all of them counted.
    """
    b_bin = tl.arange(0, BINS)
    b_count = tl.load(p_control + HISTOGRAMS + level * BINS + b_bin, cache_modifier=".cg")
    above = total - tl.sum(b_count, 0)
    b_at_least = above + tl.cumsum(b_count, 0, reverse=True)
    bin = tl.sum((b_at_least >= wanted).to(tl.int32), 0) - 1
    shift = tl.maximum(bits - BIN_BITS, 0)
    # The bracket may end too low.
    missed = above >= wanted
    count = tl.where(missed, above, tl.sum(tl.where(b_bin == bin, b_count, 0), 0))
    wanted -= tl.where(missed, 0, tl.sum(tl.where(b_bin == bin, b_at_least - b_count, 0), 0))
    next_key = tl.where(missed, stop_key, first_key + (bin << shift))
    stop_key = tl.where(missed, LAST_KEY, stop_key)
    bits = tl.where(missed, ALL_BITS, shift)
    # There are but two keys from infinity on: its own, and that of NaN.
    if (next_key >= INFINITY) & (missed == 0) & ((shift <= FRACTION_BITS) & (count > 0)):
        next_key = tl.where(next_key > INFINITY, QUIET_NAN, next_key)
        bits = tl.cast(0, tl.int32)
    return count, wanted, next_key, stop_key, bits
