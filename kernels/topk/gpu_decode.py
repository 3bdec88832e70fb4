"""From payloads back to a dense vector: one of them scattered, or those of all ranks added up.

`sum` gives one program a tile of the vector, which it adds the ranks to in their order: no two programs meet
at an element, and the result has one order of addition. Where a tile begins in each rank's ascending
indices is found beforehand, by binary search.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import widen
from gck.kernels.common.launch import EXACT, launching_on
from gck.wire import Layout

BLOCK = 1024  # payload entries a program of the scatter
SUM_TILE = 4096
SUM_BLOCK = 128  # entries of a rank at a time
SUM_WARPS = 1  # many programs that each wait little for their ranks' turns
ZEROS = tl.constexpr(512)  # that a program stores at a time
BOUNDS_BLOCK = 128  # bounds that a program searches for


@triton.jit
def _add_entries(p_out, p_values, p_indices, b_entry, stop, low, high, alpha, ACCUMULATE: tl.constexpr):
    """Entries up to `stop` whose indices lie in [low, high): a payload from elsewhere must not write
    out of bounds."""
    b_index = tl.load(p_indices + b_entry, mask=b_entry < stop, other=-1).to(tl.int64)
    b_valid = (b_index >= low) & (b_index < high)
    b_value = widen(tl.load(p_values + b_entry, mask=b_entry < stop, other=0.0)) * alpha
    if ACCUMULATE:
        b_value = tl.load(p_out + b_index, mask=b_valid, other=0.0) + b_value
    tl.store(p_out + b_index, b_value, mask=b_valid)


@triton.jit(do_not_specialize=["n", "k"])
def scatter_kernel(p_out, p_values, p_indices, n, k, alpha, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices are unique, so that no two programs meet at an element."""
    b_entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _add_entries(p_out, p_values, p_indices, b_entry, k, 0, n, alpha, ACCUMULATE)


@triton.jit(do_not_specialize=["k", "steps", "tiles", "row_units"])
def bounds_kernel(
    p_indices,
    p_bounds,
    k,
    steps,
    tiles,
    row_units,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
):
    """The first entry of each tile in each rank, as (tiles + 1, ranks). Whatever the indices are, the
    bounds of a rank never fall, so that no tile takes longer for a payload that does not ascend."""
    i_rank = tl.program_id(1)
    p_indices += i_rank.to(tl.int64) * row_units * (16 // INDEX_BYTES)
    b_tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_target = b_tile * TILE
    b_low = tl.zeros((BLOCK,), tl.int64)
    b_high = tl.zeros((BLOCK,), tl.int64) + k
    for _ in range(steps):
        b_middle = (b_low + b_high) >> 1
        b_open = b_low < b_high
        b_right = tl.load(p_indices + b_middle, mask=b_open, other=0).to(tl.int64) < b_target
        b_low = tl.where(b_open & b_right, b_middle + 1, b_low)
        b_high = tl.where(b_open & (b_right == 0), b_middle, b_high)
    tl.store(p_bounds + b_tile * tl.num_programs(1) + i_rank, b_low, mask=b_tile <= tiles)


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def sum_kernel(
    p_out,
    p_values,
    p_indices,
    p_bounds,
    n,
    ranks,
    row_units,
    alpha,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    low = i_tile * TILE
    high = tl.minimum(low + TILE, tl.cast(n, tl.int64))
    if not ACCUMULATE:
        for first in range(low, high, ZEROS):
            b_offset = first + tl.arange(0, ZEROS)
            if first + ZEROS <= high:
                tl.store(p_out + b_offset, tl.zeros((ZEROS,), tl.float32))
            else:
                tl.store(p_out + b_offset, tl.zeros((ZEROS,), tl.float32), mask=b_offset < high)
    p_bounds += i_tile * ranks
    for rank in range(ranks):
        # The threads of a program take another one's elements in the next rank.
        tl.debug_barrier()
        first = tl.load(p_bounds + rank)
        stop = tl.load(p_bounds + ranks + rank)
        for entry in range(first, stop, BLOCK):
            b_entry = entry + tl.arange(0, BLOCK)
            _add_entries(p_out, p_values, p_indices, b_entry, stop, low, high, alpha, True)
        p_values += tl.cast(row_units, tl.int64) * (16 // VALUE_BYTES)
        p_indices += tl.cast(row_units, tl.int64) * (16 // INDEX_BYTES)


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    values, indices = fields
    k = values.numel()
    if not accumulate:
        out.zero_()
    if k == 0:
        return
    with launching_on(out):
        scatter_kernel[(triton.cdiv(k, BLOCK),)](
            out, values, indices, out.numel(), k, alpha, ACCUMULATE=accumulate, BLOCK=BLOCK, **EXACT
        )


def decompress_sum_(
    compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * decoded of every row of `bodies`, in fp32 and in row order: the bytes that
    `decompress_` makes when it accumulates row by row (onto zero, where this does not accumulate).

    Args:
        compressor: what made the bodies.
        out: (numel,) fp32.
        bodies: (W, layout.nbytes) uint8, rows at multiples of 16 bytes. Indices out of range or out of
            order never write out of bounds; which of their entries are added is undefined.
        alpha: one multiplication, before the addition.
        accumulate: add to what out holds.
    """
    n, ranks = out.numel(), bodies.shape[0]
    values, indices = (bodies[:, f.offset : f.end].view(f.dtype) for f in layout.fields)
    tiles, k, row_units = triton.cdiv(n, SUM_TILE), values.shape[1], bodies.stride(0) // 16
    bounds = torch.empty((tiles + 1) * ranks, dtype=torch.int64, device=out.device)
    index_bytes = indices.element_size()
    with launching_on(out):
        bounds_kernel[(triton.cdiv(tiles + 1, BOUNDS_BLOCK), ranks)](
            *(indices, bounds, k, k.bit_length(), tiles, row_units),
            TILE=SUM_TILE,
            BLOCK=BOUNDS_BLOCK,
            INDEX_BYTES=index_bytes,
            num_warps=4,
            **EXACT,
        )
        sum_kernel[(tiles,)](
            *(out, values, indices, bounds, n, ranks, row_units, alpha),
            ACCUMULATE=accumulate,
            TILE=SUM_TILE,
            BLOCK=SUM_BLOCK,
            VALUE_BYTES=values.element_size(),
            INDEX_BYTES=index_bytes,
            num_warps=SUM_WARPS,
            **EXACT,
        )
