"""Entries of all ranks added up in dense chunks, in the order of the ranks and without atomics.

What a program waits for is asked for together: the entries of up to eight ranks, before it zeroes the chunk
that they go to. What is left is a chain, rank after rank: elements are loaded, added to and stored, in a
chunk of a few KB that this program alone touches and has just written, so that the nearest cache may answer.

Of 64 of 4096 of eight ranks a program waits once for memory, and eight times for that cache. A rank's
entries are loads and stores of 4 bytes, each of a sector of its own as a rule: those of eight ranks are as
many sectors as the chunk has. So caches store it twice, once as zeros; memory once, if it stays in a cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.chunk_topk.gpu_encode import chunk_of, indices_of, scales_of, values_of
from gck.kernels.common.keys import negated, widen
from gck.kernels.common.packing import load_codes

WARP_SLOTS = 64  # entries of a rank, in a program's chunks, for each of its warps
MAX_WARPS = 8
THREAD_ENTRIES = 16  # of all ranks under way together: a place and a value take a register each
MOST_TOGETHER = 8
STEP = tl.constexpr(4096)  # elements zeroed by one statement
TOUCHED = tl.constexpr(16384)  # elements touched by one statement
ZEROS = tl.constexpr(256)  # the same, of chunks that are cut short
SECTOR = tl.constexpr(8)  # elements that memory moves together

# What is done to dense chunks before anything is added.
KEEP, TOUCH, CLEAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _values(p_values, p_scales, b_slot, b_live, b_exists, K: tl.constexpr, BITS: tl.constexpr):
    """fp32 values of the live slots of each row."""
    b_row = tl.arange(0, b_live.shape[0])[:, None]
    if BITS >= 16:
        return widen(tl.load(p_values + b_row * K + b_slot, mask=b_live, other=0.0))
    else:
        b_code = load_codes(p_values, b_slot, b_live, BITS, K)
        if BITS == 2:
            # Both, because to ask for one of them is to wait for the code.
            b_low = tl.load(p_scales + b_row * 2, mask=b_exists, other=0.0)
            b_high = tl.load(p_scales + b_row * 2 + 1, mask=b_exists, other=0.0)
            b_level = tl.where((b_code & 1) != 0, b_high, b_low)
            return tl.where((b_code & 2) != 0, b_level, negated(b_level))
        else:
            SIGN: tl.constexpr = 2 ** (BITS - 1)
            b_code = (b_code ^ SIGN) - SIGN
            return b_code.to(tl.float32) * tl.load(p_scales + b_row, mask=b_exists, other=0.0)


@triton.jit
def _entries(
    p_values,
    p_scales,
    p_indices,
    i_rank,
    i_chunk,
    row_units,
    first,
    b_valid,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """(places in the chunks, values) of SLOTS entries of a rank, from `first` on; places are -1 where there
    is none. b_valid, (CHUNKS, 1): how many elements each chunk has."""
    i_rank = tl.cast(i_rank, tl.int64)
    p_values = chunk_of(p_values, i_rank, i_chunk, row_units, values_of(K, BITS))
    p_scales = chunk_of(p_scales, i_rank, i_chunk, row_units, scales_of(BITS))
    p_indices = chunk_of(p_indices, i_rank, i_chunk, row_units, indices_of(K, INDEX_BITS))
    b_row = tl.arange(0, b_valid.shape[0])[:, None]
    b_slot = first + tl.arange(0, SLOTS)[None, :]
    b_live = b_slot < tl.minimum(b_valid, K)
    if INDEX_BITS == 12:
        b_local = load_codes(p_indices, b_slot, b_live, 12, K)
    else:
        b_local = tl.load(p_indices + b_row * K + b_slot, mask=b_live, other=0).to(tl.int32) & 0xFFFF
    b_value = _values(p_values, p_scales, b_slot, b_live, b_valid > 0, K, BITS)
    # A payload from elsewhere must not write out of bounds.
    return tl.where(b_live & (b_local < b_valid), b_row * 2**LEVELS + b_local, -1), b_value


@triton.jit
def _prepare(p_dense, left, SIZE: tl.constexpr, START: tl.constexpr):
    """Zeroes the chunks; or touches them, so that they are on their way while entries are."""
    if START == CLEAR:
        if left == SIZE:
            PART: tl.constexpr = min(SIZE, STEP)
            for first in range(0, SIZE, PART):
                tl.store(p_dense + first + tl.arange(0, PART), tl.zeros((PART,), tl.float32))
        else:
            for first in range(0, left, ZEROS):
                b_offset = first + tl.arange(0, ZEROS)
                tl.store(p_dense + b_offset, tl.zeros((ZEROS,), tl.float32), mask=b_offset < left)
    elif START == TOUCH:
        SPAN: tl.constexpr = min(SIZE, TOUCHED)
        for first in range(0, SIZE, SPAN):
            b_sector = first + tl.arange(0, SPAN // SECTOR) * SECTOR
            tl.load(p_dense + b_sector, mask=b_sector < left, volatile=True)


@triton.jit
def _add(p_dense, b_place, b_value, alpha, reads):
    """To what is there where it `reads`, else to zero."""
    b_old = tl.load(p_dense + b_place, mask=(b_place >= 0) & reads, other=0.0)
    tl.store(p_dense + b_place, b_old + b_value * alpha, mask=b_place >= 0)


@triton.jit
def sum_chunks(
    p_dense,
    p_values,
    p_scales,
    p_indices,
    i_chunk,
    left,
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
    """Adds alpha * entries of CHUNKS chunks, from the i_chunk-th of each body on, to p_dense, of whose
    elements `left` exist. Bodies are row_units * 16 bytes apart. Without ADD there is one rank, which is
    written.

    Indices of a rank differ, so that no two of its entries meet; those of different ranks meet in order.
    """
    b_valid = tl.minimum(left - tl.arange(0, CHUNKS)[:, None] * 2**LEVELS, 2**LEVELS)
    for first_rank in range(0, ranks, RANKS):
        entries = ()
        for i in tl.static_range(RANKS):
            b_here = tl.where(first_rank + i < ranks, b_valid, 0)
            row = (p_values, p_scales, p_indices, first_rank + i, i_chunk, row_units, 0, b_here)
            entries += (_entries(*row, K, LEVELS, BITS, INDEX_BITS, SLOTS),)
        if first_rank == 0:
            _prepare(p_dense, left, CHUNKS * 2**LEVELS, START)
        for i in tl.static_range(RANKS):
            tl.debug_barrier()  # what the rank before wrote, other threads now read
            if ADD:
                _add(p_dense, *entries[i], alpha, (START != CLEAR) | (first_rank + i > 0))
            else:
                tl.store(p_dense + entries[i][0], entries[i][1] * alpha, mask=entries[i][0] >= 0)
            if SLOTS < K:  # then RANKS is 1, for the next rank must not overtake
                for first in range(SLOTS, K, SLOTS):
                    row = (p_values, p_scales, p_indices, first_rank, i_chunk, row_units, first, b_valid)
                    b_place, b_value = _entries(*row, K, LEVELS, BITS, INDEX_BITS, SLOTS)
                    if ADD:
                        _add(p_dense, b_place, b_value, alpha, (START != CLEAR) | (first_rank > 0))
                    else:
                        tl.store(p_dense + b_place, b_value * alpha, mask=b_place >= 0)


def sum_options(k: int, chunks: int, ranks: int, num_warps: int) -> dict[str, int]:
    """Compile-time values of `sum_chunks` that depend on how many entries a program's threads have."""
    threads = 32 * num_warps
    slots = min(triton.next_power_of_2(k), max(threads * THREAD_ENTRIES // chunks, 1))
    together = min(triton.next_power_of_2(ranks), MOST_TOGETHER)
    if slots < k:
        together = 1
    while together > 1 and together * slots * chunks > threads * THREAD_ENTRIES:
        together //= 2
    return {"SLOTS": slots, "RANKS": together}


def sum_warps(k: int, chunks: int) -> int:
    """Warps of a program that does nothing else. A chain is as long for one, and waits for no other."""
    warps: int = chunks * triton.next_power_of_2(k) // WARP_SLOTS
    return max(min(warps, MAX_WARPS), 1)


def row_fields(compressor: Any, fields: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(values, scales, indices) of a body as kernels take them: Triton knows no 16 bits without a sign."""
    values, scales, indices = fields
    return values, scales, indices if compressor.packs_indices else indices.view(torch.int16)
