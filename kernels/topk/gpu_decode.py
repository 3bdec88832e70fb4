"""From payloads back to a dense vector: one of them scattered, or those of all ranks added up.

`sum` gives one program a tile of the vector, which it adds the ranks to in their order: no two programs meet
at an element, and the result has one order of addition. Where a tile begins in each rank's ascending
indices is found beforehand, by binary search.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import widen
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.topk import coded
from gck.wire import Layout

BLOCK = 1024  # payload entries a program of the scatter
SUM_TILE = 4096
# (entries of a rank at a time, ranks whose entries are under way together, warps), where a tile has few
# entries of a rank, and where it has many.
SUM_FEW = (128, 8, 8)
SUM_MANY = (256, 4, 8)
FEW = 48  # entries of a rank in a tile, on average, that a block of the few mostly holds
ZEROS = tl.constexpr(256)  # that the last tile stores at a time
SECTOR = tl.constexpr(8)  # elements that memory moves together
# Entries an element, of all ranks, from which a tile is brought to the cache before it is added to: with
# fewer, most of the result need not be read.
TOUCH_FROM = 1 / 32
BOUNDS_BLOCK = 128  # bounds that a program searches for
BOUNDS_WAYS = 4  # parts that a step of the search cuts what is left into


@triton.jit(do_not_specialize=["n", "k"])
def scatter_kernel(p_out, p_values, p_indices, n, k, alpha, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices are unique, so that no two programs meet at an element."""
    b_entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_place = tl.load(p_indices + b_entry, mask=b_entry < k, other=-1).to(tl.int64)
    b_value = widen(tl.load(p_values + b_entry, mask=b_entry < k, other=0.0)) * alpha
    b_valid = (b_place >= 0) & (b_place < n)
    if ACCUMULATE:
        b_value = tl.load(p_out + b_place, mask=b_valid, other=0.0) + b_value
    tl.store(p_out + b_place, b_value, mask=b_valid)


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
    WAYS: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
):
    """The first entry of each tile in each rank, as (tiles + 1, ranks). Whatever the indices are, the
    bounds of a rank never fall, so that no tile takes longer for a payload that does not ascend.

    A step looks at the last entry of each of WAYS parts of what is left. It waits for memory once: the more
    parts, the fewer steps, and the more loads.
    """
    i_rank = tl.program_id(1)
    p_indices += i_rank.to(tl.int64) * row_units * (16 // INDEX_BYTES)
    b_tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_target = (b_tile * TILE)[:, None]
    b_way = tl.arange(0, WAYS)[None, :]
    b_low = tl.zeros((BLOCK,), tl.int64)
    b_high = tl.zeros((BLOCK,), tl.int64) + k
    for _ in range(steps):
        b_part = tl.maximum((b_high - b_low + WAYS - 1) // WAYS, 1)
        b_last = b_low[:, None] + (b_way + 1) * b_part[:, None] - 1
        b_looks = b_last < b_high[:, None]
        b_index = tl.load(p_indices + b_last, mask=b_looks, other=0).to(tl.int64)
        b_before = tl.sum((b_looks & (b_index < b_target)).to(tl.int32), 1)  # parts wholly before the tile
        b_low += b_before * b_part
        b_high = tl.minimum(b_high, b_low + b_part - 1)
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
    TOUCH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
):
    """Adds the ranks' entries to a tile, RANKS of them at a time: their loads are all under way before the
    first is added, since each addition has to wait for that of the rank before."""
    i_tile = tl.program_id(0).to(tl.int64)
    low = i_tile * TILE
    size = tl.minimum(TILE, tl.cast(n, tl.int64) - low).to(tl.int32)
    p_tile = p_out + low
    p_bounds += i_tile * ranks
    row_values = tl.cast(row_units, tl.int64) * (16 // VALUE_BYTES)
    row_indices = tl.cast(row_units, tl.int64) * (16 // INDEX_BYTES)
    for first_rank in range(0, ranks, RANKS):
        bounds = ()
        for i in tl.static_range(RANKS):
            here = first_rank + i < ranks
            p_bound = p_bounds + first_rank + i
            bounds += ((tl.load(p_bound, mask=here, other=0), tl.load(p_bound + ranks, mask=here, other=0)),)
        entries = ()
        longer = tl.cast(0, tl.int32)  # bit i: rank i has more than a block
        for i in tl.static_range(RANKS):
            first, stop = bounds[i]
            p_index, p_value = p_indices + i * row_indices, p_values + i * row_values
            entries += (_load_entries(p_value, p_index, first + tl.arange(0, BLOCK), stop),)
            longer |= (stop - first > BLOCK).to(tl.int32) << i
        if first_rank == 0:
            _prepare(p_tile, size, ACCUMULATE, TOUCH, TILE)
        places = ()
        for i in tl.static_range(RANKS):
            places += (_places(entries[i][1], low, size),)
        for i in tl.static_range(RANKS):
            # The threads of a program take another one's elements in the next rank.
            tl.debug_barrier()
            reads = ACCUMULATE or first_rank + i > 0
            _add_entries(p_tile, entries[i][0], places[i], alpha, reads)
            entry = tl.cast(BLOCK, tl.int64)
            more = (longer >> i) & 1 != 0
            while more:  # rare, and not worth registers: bounds are loaded anew
                p_bound = p_bounds + first_rank + i
                b_entry = tl.load(p_bound) + entry + tl.arange(0, BLOCK)
                stop = tl.load(p_bound + ranks)
                p_index, p_value = p_indices + i * row_indices, p_values + i * row_values
                b_value, b_index = _load_entries(p_value, p_index, b_entry, stop)
                _add_entries(p_tile, b_value, _places(b_index, low, size), alpha, reads)
                entry += BLOCK
                more = tl.load(p_bound) + entry < stop
        p_indices += RANKS * row_indices
        p_values += RANKS * row_values


@triton.jit
def _load_entries(p_values, p_indices, b_entry, stop):
    b_index = tl.load(p_indices + b_entry, mask=b_entry < stop, other=-1)
    return tl.load(p_values + b_entry, mask=b_entry < stop, other=0.0), b_index


@triton.jit
def _places(b_index, low, size):
    """Where in the tile, or -1: a payload from elsewhere must not write out of bounds."""
    b_place = b_index.to(tl.int64) - low
    return tl.where((b_place >= 0) & (b_place < size), b_place, -1).to(tl.int32)


@triton.jit
def _add_entries(p_tile, b_value, b_place, alpha, reads):
    """To what is there where it `reads`, else to zero."""
    b_old = tl.load(p_tile + b_place, mask=(b_place >= 0) & reads, other=0.0)
    tl.store(p_tile + b_place, b_old + widen(b_value) * alpha, mask=b_place >= 0)


@triton.jit
def _prepare(p_tile, size, ACCUMULATE: tl.constexpr, TOUCH: tl.constexpr, TILE: tl.constexpr):
    """Zeroes the tile; or touches it, so that it is on its way to the cache while entries are."""
    if not ACCUMULATE:
        if size == TILE:
            tl.store(p_tile + tl.arange(0, TILE), tl.zeros((TILE,), tl.float32))
        else:
            for first in range(0, size, ZEROS):
                b_offset = first + tl.arange(0, ZEROS)
                tl.store(p_tile + b_offset, tl.zeros((ZEROS,), tl.float32), mask=b_offset < size)
    elif TOUCH:
        b_sector = tl.arange(0, TILE // SECTOR) * SECTOR
        tl.load(p_tile + b_sector, mask=b_sector < size, volatile=True)


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    if not compressor.is_plain:
        coded.decompress_(decompress_, compressor, out, fields, alpha, accumulate)
        return
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
    if not compressor.is_plain:
        coded.decompress_sum_(decompress_sum_, compressor, out, bodies, layout, alpha, accumulate)
        return
    n, ranks = out.numel(), bodies.shape[0]
    values, indices = (bodies[:, f.offset : f.end].view(f.dtype) for f in layout.fields)
    tiles, k, row_units = triton.cdiv(n, SUM_TILE), values.shape[1], bodies.stride(0) // 16
    # Of 32 bits while a block past the last entry is no matter.
    bounds_dtype = torch.int32 if k < 2**30 else torch.int64
    bounds = torch.empty((tiles + 1) * ranks, dtype=bounds_dtype, device=out.device)
    index_bytes = indices.element_size()
    block, together, warps = SUM_FEW if k * SUM_TILE <= FEW * n else SUM_MANY
    touch = accumulate and ranks * k >= TOUCH_FROM * n
    with launching_on(out):
        bounds_kernel[(triton.cdiv(tiles + 1, BOUNDS_BLOCK), ranks)](
            *(indices, bounds, k, _steps(k), tiles, row_units),
            TILE=SUM_TILE,
            BLOCK=BOUNDS_BLOCK,
            WAYS=BOUNDS_WAYS,
            INDEX_BYTES=index_bytes,
            num_warps=4,
            **EXACT,
        )
        sum_kernel[(tiles,)](
            *(out, values, indices, bounds, n, ranks, row_units, alpha),
            ACCUMULATE=accumulate,
            TOUCH=touch,
            TILE=SUM_TILE,
            BLOCK=block,
            RANKS=min(together, triton.next_power_of_2(ranks)),
            VALUE_BYTES=values.element_size(),
            INDEX_BYTES=index_bytes,
            num_warps=warps,
            **EXACT,
        )


def _steps(k: int) -> int:
    """How many steps find a bound in k entries: each leaves one less than a part."""
    steps = 0
    while k > 0:
        k, steps = triton.cdiv(k, BOUNDS_WAYS) - 1, steps + 1
    return steps
