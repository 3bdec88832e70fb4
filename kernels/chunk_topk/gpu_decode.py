"""From payloads back to a dense vector: a program walks the ranks in order, without atomics.

What lies between a chunk's zeros and its last entry should be in a cache, that dense memory is written once.
Therefore only so many programs are started as have room there together, and they loop over the chunks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.chunk_topk.gpu_sum import CLEAR, KEEP, TOUCH, row_fields, sum_chunks, sum_options, sum_warps
from gck.kernels.common.launch import EXACT, launching_on, looping
from gck.wire import Layout

GROUP = 2048  # elements of a program's small chunks together
# Elements that the programs of a processor have under way: half of an H100's nearest cache, and together a
# third of the farther one.
UNDER_WAY = 32768
MOST_PROGRAMS = 16  # of a processor
MOST_WARPS = 32  # of the same
# Entries an element, of all ranks, from which a chunk is brought to the cache before it is added to: with
# fewer, most of the result need not be read.
TOUCH_FROM = 1 / 32


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def decompress_kernel(
    p_out,
    p_values,
    p_scales,
    p_indices,
    n,
    ranks,
    row_units,
    alpha,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    START: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program makes groups of CHUNKS dense chunks, as many programs apart as there are."""
    SIZE: tl.constexpr = CHUNKS * 2**LEVELS
    groups = (tl.cast(n, tl.int64) + SIZE - 1) // SIZE
    # What every turn needs would be kept in registers through all of them.
    for i_group in tl.range(tl.program_id(0).to(tl.int64), groups, tl.num_programs(0), disable_licm=True):
        left = tl.minimum(n - i_group * SIZE, SIZE).to(tl.int32)
        sum_chunks(
            p_out + i_group * SIZE,
            *(p_values, p_scales, p_indices, i_group * CHUNKS, left, ranks, row_units, alpha),
            *(K, CHUNKS, LEVELS, BITS, INDEX_BITS, SLOTS, RANKS, START, ADD),
        )


def decompress_options(
    compressor: Any, ranks: int, *, clear: bool, add: bool
) -> tuple[dict[str, Any], int, int]:
    """(compile-time values, warps, programs a processor) of `decompress_kernel`."""
    k, chunk = compressor.k, compressor.chunk_size
    chunks = max(GROUP // chunk, 1)
    start, num_warps = KEEP, sum_warps(k, chunks)
    if clear:
        start = CLEAR
    elif ranks * k >= TOUCH_FROM * chunk:
        start = TOUCH
    options = {
        "K": k,
        "CHUNKS": chunks,
        "LEVELS": chunk.bit_length() - 1,
        "BITS": compressor.value_bits,
        "INDEX_BITS": 12 if compressor.packs_indices else 16,
        **sum_options(k, chunks, ranks, num_warps),
        "START": start.value,
        "ADD": add,
    }
    programs = MOST_PROGRAMS if start is KEEP else UNDER_WAY // (chunks * chunk)
    return options, num_warps, max(min(programs, MOST_PROGRAMS, MOST_WARPS // num_warps), 2)


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    _decompress(compressor, out, fields, 1, 0, alpha, clear=not accumulate, add=accumulate)


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
    options, num_warps, programs = decompress_options(compressor, ranks, clear=clear, add=add)
    groups = triton.cdiv(out.numel(), options["CHUNKS"] * compressor.chunk_size)
    with launching_on(out):
        decompress_kernel[(min(groups, looping(out, programs)),)](
            *(out, *row_fields(compressor, fields), out.numel(), ranks, row_units, alpha),
            **options,
            num_warps=num_warps,
            **EXACT,
        )
