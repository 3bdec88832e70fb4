"""Chunk top-k with error feedback on the GPU: one program owns a chunk, or a group of small ones.

acc = grad + err of its chunks stays in registers, where it bisects on the bits of the magnitudes, from the
least of K group maxima on, until K entries lie above. A chunk that no program can hold is read again and
again from err instead, which lies in the L2 cache by then. Positions are written in order, and after a
barrier the program reads its compact entries back: codes, scales and the residuals of what was selected are
made from those.

Row s of `bodies` is a shard's body; the grid is (groups a shard, shards).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.compressor import shard_numel
from gck.kernels.common.codes import scaled_codes, two_level_codes
from gck.kernels.common.keys import INFINITY, accumulate, is_finite, magnitude_key, round_to, widen
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.packing import load_codes, store_codes
from gck.wire import Layout

# Elements a warp: of a gradient of 2 bytes a thread then has one load of 16 bytes. With twice as many, or
# with more warps, some targets have too few registers.
WARP_ELEMENTS = {4: 512, 2: 256}
MAX_WARPS = 16
GROUP = 2048  # elements of a program's small chunks together
TILE = 4096  # elements that are looked at together of a chunk that is too large for the registers
ENTRIES = 1024  # entries of a chunk that are decoded together


@triton.jit
def _group_floor(b_key, ROWS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """The least of GROUPS group maxima of each row: at least GROUPS of its keys reach it."""
    b_maximum = tl.max(tl.reshape(b_key, (ROWS, SIZE // GROUPS, GROUPS)), 1)
    # By way of a column, because Triton 3.6 fails on the floor that comes from one reduction of another: it
    # makes it anew in the layout of each use, and loses count of those.
    return tl.reshape(tl.maximum(tl.min(b_maximum, 1, keep_dims=True), 0), (ROWS,))


@triton.jit
def _halve(b_low, b_high, b_at_low, b_above, b_middle, b_reach, b_wanted):
    """One step of the bisection: b_reach keys are >= b_middle. Keeps at_low >= wanted > above."""
    b_open = (b_at_low > b_wanted) & (b_high - b_low > 1)
    b_up = b_open & (b_reach >= b_wanted)
    b_down = b_open & (b_reach < b_wanted)
    return (
        tl.where(b_up, b_middle, b_low),
        tl.where(b_down, b_middle, b_high),
        tl.where(b_up, b_reach, b_at_low),
        tl.where(b_down, b_reach, b_above),
    )


@triton.jit
def _encode(
    p_err,
    p_position,
    p_values,
    p_scales,
    p_indices,
    p_nonfinite,
    b_wanted,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOT_LEVELS: tl.constexpr,
):
    """Writes the rows of chunks whose b_wanted positions are known, and the residuals of those entries.

    All pointers are those of the first chunk; err holds acc where it was selected.
    """
    ROWS: tl.constexpr = b_wanted.shape[0]
    SLOTS: tl.constexpr = 2**SLOT_LEVELS
    b_row = tl.arange(0, ROWS)
    b_slot = tl.arange(0, SLOTS)[None, :]
    b_exists = b_wanted > 0
    b_live = b_slot < b_wanted[:, None]
    b_write = b_exists[:, None] & (b_slot < K)
    b_entry = b_row[:, None] * K + b_slot
    b_position = tl.load(p_position + b_entry, mask=b_live, other=0).to(tl.int32) & 0xFFFF
    p_entry = p_err + b_row[:, None] * 2**LEVELS + b_position
    b_acc = tl.load(p_entry, mask=b_live, other=0.0)
    if BITS >= 16:
        b_value = round_to(b_acc, p_values.dtype.element_ty)
        b_decoded = widen(b_value)
        tl.store(p_values + b_entry, b_value, mask=b_write)
    elif BITS == 2:
        b_code, b_low, b_high, b_decoded = two_level_codes(b_acc, b_live, b_wanted, SLOT_LEVELS)
        store_codes(p_values, b_code, b_exists, BITS, K)
        tl.store(p_scales + 2 * b_row, b_low, mask=b_exists)
        tl.store(p_scales + 2 * b_row + 1, b_high, mask=b_exists)
    else:
        b_code, b_scale, b_decoded = scaled_codes(b_acc, b_live, BITS)
        store_codes(p_values, b_code, b_exists, BITS, K)
        tl.store(p_scales + b_row, b_scale, mask=b_exists)
    if INDEX_BITS == 12:
        store_codes(p_indices, b_position, b_exists, INDEX_BITS, K)
    else:
        tl.store(p_indices + b_entry, b_position.to(tl.int16), mask=b_write)
    b_residual = b_acc - b_decoded
    tl.store(p_entry, b_residual, mask=b_live)
    _clear(p_entry, b_live & (is_finite(b_residual) == 0), p_nonfinite)


@triton.jit
def _clear(p_elements, b_cleared, p_nonfinite):
    """Counts b_cleared and writes zeros there: of what is not finite nothing stays."""
    cleared = tl.sum(tl.reshape(b_cleared.to(tl.int32), (b_cleared.numel,)), 0)
    if cleared > 0:
        tl.store(p_elements, tl.zeros(b_cleared.shape, tl.float32), mask=b_cleared)
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")


@triton.jit
def _select_held(
    p_grad,
    p_err,
    p_position,
    p_nonfinite,
    left,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Moves acc of CHUNKS chunks, of which `left` elements exist, to err; writes the positions of the
    largest. Returns how many those are, for each chunk."""
    CHUNK: tl.constexpr = 2**LEVELS
    b_row = tl.arange(0, CHUNKS)
    b_local = tl.arange(0, CHUNK)[None, :]
    b_offset = b_row[:, None] * CHUNK + b_local
    # Only the keys stay in registers: what is selected is read back.
    if WHOLE:
        b_acc = accumulate(tl.load(p_grad + b_offset), tl.load(p_err + b_offset))
        tl.store(p_err + b_offset, b_acc)
        b_key = magnitude_key(b_acc)
        b_wanted = tl.full((CHUNKS,), K, tl.int32)
    else:
        b_inside = b_offset < left
        b_grad = tl.load(p_grad + b_offset, mask=b_inside, other=0.0)
        b_acc = accumulate(b_grad, tl.load(p_err + b_offset, mask=b_inside, other=0.0))
        tl.store(p_err + b_offset, b_acc, mask=b_inside)
        b_key = tl.where(b_inside, magnitude_key(b_acc), -1)
        b_wanted = tl.minimum(tl.maximum(left - b_row * CHUNK, 0), K)

    b_low = _group_floor(b_key, CHUNKS, CHUNK, GROUPS)
    b_high = tl.max(b_key, 1) + 1
    wild = tl.max(b_high, 0) > INFINITY
    b_at_low = tl.sum((b_key >= b_low[:, None]).to(tl.int32), 1)
    b_above = tl.zeros((CHUNKS,), tl.int32)
    while tl.max(((b_at_low > b_wanted) & (b_high - b_low > 1)).to(tl.int32), 0) > 0:
        b_middle = b_low + (b_high - b_low) // 2
        b_reach = tl.sum((b_key >= b_middle[:, None]).to(tl.int32), 1)
        b_low, b_high, b_at_low, b_above = _halve(
            b_low, b_high, b_at_low, b_above, b_middle, b_reach, b_wanted
        )

    # One scan ranks both classes: 1 for what lies above the last key, 65536 for what equals it.
    b_quota = tl.where(b_at_low > b_wanted, b_wanted - b_above, CHUNK)[:, None]
    b_class = tl.where(b_key > b_low[:, None], 1, tl.where(b_key == b_low[:, None], 65536, 0))
    b_rank = tl.cumsum(b_class, 1)
    b_ties = tl.minimum(b_rank >> 16, b_quota)
    b_wins = (b_class == 1) | ((b_class > 1) & ((b_rank >> 16) <= b_quota))
    b_slot = (b_rank & 0xFFFF) + b_ties - 1
    tl.store(p_position + b_row[:, None] * K + b_slot, b_local.to(tl.int16), mask=b_wins)
    if wild:
        _clear(p_err + b_offset, (b_key >= INFINITY) & (b_wins == 0), p_nonfinite)
    return b_wanted


@triton.jit
def _keys_of_tile(p_err, b_local, left, WHOLE: tl.constexpr):
    """Keys of a tile of a large chunk, -1 past its `left` elements."""
    if WHOLE:
        return magnitude_key(tl.load(p_err + b_local))
    else:
        b_inside = b_local < left
        return tl.where(b_inside, magnitude_key(tl.load(p_err + b_local, mask=b_inside, other=0.0)), -1)


@triton.jit
def _select_large(
    p_grad,
    p_err,
    p_position,
    p_nonfinite,
    left,
    K: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`_select` for one chunk that is walked in tiles, over and over. Returns how many were selected."""
    CHUNK: tl.constexpr = 2**LEVELS
    wanted = tl.minimum(left, K)
    b_most = tl.zeros((TILE,), tl.int32)
    for first in range(0, left, TILE):
        b_local = first + tl.arange(0, TILE)
        if WHOLE:
            b_acc = accumulate(tl.load(p_grad + b_local), tl.load(p_err + b_local))
            tl.store(p_err + b_local, b_acc)
        else:
            b_inside = b_local < left
            b_grad = tl.load(p_grad + b_local, mask=b_inside, other=0.0)
            b_acc = accumulate(b_grad, tl.load(p_err + b_local, mask=b_inside, other=0.0))
            tl.store(p_err + b_local, b_acc, mask=b_inside)
        b_most = tl.maximum(b_most, magnitude_key(b_acc))
    tl.debug_barrier()

    low = wanted * 0
    if GROUPS <= TILE:
        low = tl.max(_group_floor(b_most, 1, TILE, GROUPS), 0)
    high = tl.max(b_most, 0) + 1
    wild = high > INFINITY
    # At least `wanted` reach the floor; how many is not known, so that the first step must be taken.
    at_low = wanted * 0 + CHUNK
    above = wanted * 0
    while (at_low > wanted) & (high - low > 1):
        middle = low + (high - low) // 2
        b_reach = tl.zeros((TILE,), tl.int32)
        for first in range(0, left, TILE):
            b_key = _keys_of_tile(p_err, first + tl.arange(0, TILE), left, WHOLE)
            b_reach += (b_key >= middle).to(tl.int32)
        reach = tl.sum(b_reach, 0)
        low, high, at_low, above = _halve(low, high, at_low, above, middle, reach, wanted)

    # A chunk whose interval had no inside at once was not counted: then no key is above low.
    quota = tl.where(at_low > wanted, wanted - above, CHUNK)
    position = wanted * 0
    for first in range(0, left, TILE):
        b_local = first + tl.arange(0, TILE)
        b_key = _keys_of_tile(p_err, b_local, left, WHOLE)
        b_class = tl.where(b_key > low, 1, tl.where(b_key == low, 65536, 0))
        both = tl.sum(b_class, 0)
        b_rank = tl.cumsum(b_class, 0)
        b_ties = tl.minimum(b_rank >> 16, quota)
        b_wins = (b_class == 1) | ((b_class > 1) & ((b_rank >> 16) <= quota))
        b_slot = position + (b_rank & 0xFFFF) + b_ties - 1
        tl.store(p_position + b_slot, b_local.to(tl.int16), mask=b_wins)
        if wild:
            _clear(p_err + b_local, (b_key >= INFINITY) & (b_wins == 0), p_nonfinite)
        ties = tl.minimum(both >> 16, quota)
        position += (both & 0xFFFF) + ties
        quota -= ties
    return wanted


@triton.jit
def _select(
    p_grad,
    p_err,
    p_position,
    p_nonfinite,
    left,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    if 2**LEVELS > TILE:
        wanted = _select_large(p_grad, p_err, p_position, p_nonfinite, left, K, LEVELS, GROUPS, TILE, WHOLE)
        return tl.zeros((1,), tl.int32) + wanted
    else:
        return _select_held(p_grad, p_err, p_position, p_nonfinite, left, K, CHUNKS, LEVELS, GROUPS, WHOLE)


@triton.jit
def _chunk_of(p_field, i_shard, i_chunk, row_units, COUNT: tl.constexpr):
    """Where COUNT elements a chunk lie in rows of bodies that are row_units * 16 bytes apart."""
    UNIT: tl.constexpr = 128 // p_field.dtype.element_ty.primitive_bitwidth
    return p_field + i_shard * row_units * UNIT + i_chunk * COUNT


@triton.jit(do_not_specialize=["n", "shard_chunks", "row_units"])
def compress_kernel(
    p_grad,
    p_err,
    p_position,
    p_values,
    p_scales,
    p_indices,
    p_nonfinite,
    n,
    shard_chunks,
    row_units,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOT_LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program compresses CHUNKS chunks of 2**LEVELS elements; one that is larger than TILE is walked in
    tiles. Positions, K a chunk, lie in one array for
    all shards."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_shard = tl.program_id(1).to(tl.int64)
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    i_first = i_shard * shard_chunks + i_chunk
    # The last group of a shard stops at the shard's end: what follows belongs to the next row.
    stop = tl.minimum((i_shard + 1) * shard_chunks * CHUNK, tl.cast(n, tl.int64))
    left = tl.minimum(stop - i_first * CHUNK, CHUNKS * CHUNK).to(tl.int32)
    p_grad += i_first * CHUNK
    p_err += i_first * CHUNK
    p_position += i_first * K
    if left > 0:
        if left == CHUNKS * CHUNK:
            b_wanted = _select(
                p_grad, p_err, p_position, p_nonfinite, left, K, CHUNKS, LEVELS, GROUPS, TILE, True
            )
        else:
            b_wanted = _select(
                p_grad, p_err, p_position, p_nonfinite, left, K, CHUNKS, LEVELS, GROUPS, TILE, False
            )
        tl.debug_barrier()
        _encode(
            p_err,
            p_position,
            _chunk_of(p_values, i_shard, i_chunk, row_units, K if BITS >= 16 else (K * BITS + 7) // 8),
            _chunk_of(p_scales, i_shard, i_chunk, row_units, 2 if BITS == 2 else 1),
            _chunk_of(p_indices, i_shard, i_chunk, row_units, K if INDEX_BITS == 16 else (K * 12 + 7) // 8),
            p_nonfinite,
            b_wanted,
            K,
            LEVELS,
            BITS,
            INDEX_BITS,
            SLOT_LEVELS,
        )


@triton.jit
def _decode(p_values, p_scales, b_slot, b_live, K: tl.constexpr, BITS: tl.constexpr):
    """fp32 values of the live slots of each row."""
    ROWS: tl.constexpr = b_live.shape[0]
    b_row = tl.arange(0, ROWS)[:, None]
    if BITS >= 16:
        return widen(tl.load(p_values + b_row * K + b_slot, mask=b_live, other=0.0))
    elif BITS == 2:
        b_code = load_codes(p_values, b_slot, b_live, BITS, K)
        b_level = tl.load(p_scales + b_row * 2 + (b_code & 1), mask=b_live, other=0.0)
        return tl.where((b_code & 2) != 0, b_level, -b_level)
    else:
        SIGN: tl.constexpr = 2 ** (BITS - 1)
        b_code = (load_codes(p_values, b_slot, b_live, BITS, K) ^ SIGN) - SIGN
        return b_code.to(tl.float32) * tl.load(p_scales + b_row + b_slot * 0, mask=b_live, other=0.0)


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
    CLEAR: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program owns CHUNKS dense chunks and walks the bodies of all ranks, row_units * 16 bytes apart, in
    order; SLOTS entries a chunk at a time. CLEAR: from zero; ADD: entries are added, else written."""
    CHUNK: tl.constexpr = 2**LEVELS
    i_chunk = tl.program_id(0).to(tl.int64) * CHUNKS
    left = tl.minimum(tl.cast(n, tl.int64) - i_chunk * CHUNK, CHUNKS * CHUNK).to(tl.int32)
    p_out += i_chunk * CHUNK
    if CLEAR:
        STEP: tl.constexpr = min(CHUNKS * CHUNK, 4096)
        for first in range(0, CHUNKS * CHUNK, STEP):
            b_offset = first + tl.arange(0, STEP)
            tl.store(p_out + b_offset, tl.zeros((STEP,), tl.float32), mask=b_offset < left)
    b_row = tl.arange(0, CHUNKS)[:, None]
    b_valid = tl.minimum(left - b_row * CHUNK, CHUNK)
    for rank in range(ranks):
        i_rank = tl.cast(rank, tl.int64)
        p_rank_values = _chunk_of(
            p_values, i_rank, i_chunk, row_units, K if BITS >= 16 else (K * BITS + 7) // 8
        )
        p_rank_scales = _chunk_of(p_scales, i_rank, i_chunk, row_units, 2 if BITS == 2 else 1)
        p_rank_indices = _chunk_of(
            p_indices, i_rank, i_chunk, row_units, K if INDEX_BITS == 16 else (K * 12 + 7) // 8
        )
        tl.debug_barrier()  # what the rank before wrote, other threads now read
        for first in range(0, K, SLOTS):
            b_slot = first + tl.arange(0, SLOTS)[None, :]
            b_live = b_slot < tl.minimum(b_valid, K)
            if INDEX_BITS == 12:
                b_local = load_codes(p_rank_indices, b_slot, b_live, 12, K)
            else:
                b_local = (
                    tl.load(p_rank_indices + b_row * K + b_slot, mask=b_live, other=0).to(tl.int32) & 0xFFFF
                )
            b_value = _decode(p_rank_values, p_rank_scales, b_slot, b_live, K, BITS) * alpha
            b_live &= b_local < b_valid  # a payload from elsewhere must not write out of bounds
            p_element = p_out + b_row * CHUNK + b_local
            if ADD:
                b_value = tl.load(p_element, mask=b_live, other=0.0) + b_value
            tl.store(p_element, b_value, mask=b_live)


def compress_options(compressor: Any, itemsize: int) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `compress_kernel` for gradients of `itemsize` bytes an element."""
    chunk, groups = compressor.chunk_size, triton.next_power_of_2(compressor.k)
    large = chunk > MAX_WARPS * WARP_ELEMENTS[itemsize]
    options = {
        "K": compressor.k,
        "CHUNKS": max(GROUP // chunk, 1),
        "LEVELS": chunk.bit_length() - 1,
        "GROUPS": groups,
        "BITS": compressor.value_bits,
        "INDEX_BITS": 12 if compressor.packs_indices else 16,
        "SLOT_LEVELS": max(groups, 8).bit_length() - 1,
        "TILE": TILE if large else max(GROUP, chunk),
    }
    return options, MAX_WARPS if large else max(GROUP, chunk) // WARP_ELEMENTS[itemsize]


def decompress_options(compressor: Any, *, clear: bool, add: bool) -> tuple[dict[str, Any], int]:
    """(compile-time values, warps) of `decompress_kernel`."""
    options = {
        "K": compressor.k,
        "CHUNKS": max(GROUP // compressor.chunk_size, 1),
        "LEVELS": compressor.chunk_size.bit_length() - 1,
        "BITS": compressor.value_bits,
        "INDEX_BITS": 12 if compressor.packs_indices else 16,
        "SLOTS": min(triton.next_power_of_2(compressor.k), ENTRIES),
        "CLEAR": clear,
        "ADD": add,
    }
    return options, 4


def compress_(compressor: Any, grad: Tensor, err: Tensor, bodies: Tensor, nonfinite: Tensor | None) -> None:
    n, chunk, k, shards = grad.numel(), compressor.chunk_size, compressor.k, bodies.shape[0]
    shard = shard_numel(n, chunk, shards)
    shard_chunks = compressor.chunks(shard)
    _, scales, indices = compressor.layout(shard).fields
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    arguments = (
        grad,
        err,
        torch.empty(shards * shard_chunks * k, dtype=torch.int16, device=grad.device),
        bodies.view(compressor.value_dtype),
        bodies[:, scales.offset :].view(torch.float32),
        bodies[:, indices.offset :].view(torch.uint8 if compressor.packs_indices else torch.int16),
        nonfinite,
        n,
        shard_chunks,
        bodies.stride(0) // 16,
    )
    options, num_warps = compress_options(compressor, grad.element_size())
    with launching_on(grad):
        compress_kernel[(triton.cdiv(shard_chunks, options["CHUNKS"]), shards)](
            *arguments, **options, num_warps=num_warps, **EXACT
        )


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
    values, scales, indices = fields
    options, num_warps = decompress_options(compressor, clear=clear, add=add)
    grid = (triton.cdiv(compressor.chunks(out.numel()), options["CHUNKS"]),)
    if not compressor.packs_indices:
        indices = indices.view(torch.int16)
    with launching_on(out):
        decompress_kernel[grid](
            out,
            values,
            scales,
            indices,
            out.numel(),
            ranks,
            row_units,
            alpha,
            **options,
            num_warps=num_warps,
            **EXACT,
        )
