"""From payloads back to a dense vector: a program walks the ranks in order, without atomics."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.chunk_topk.gpu_encode import chunk_of
from gck.kernels.common.keys import widen
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.packing import load_codes
from gck.wire import Layout

ENTRIES = 1024  # entries of a chunk that are decoded together
GROUP = 2048  # elements of a program's small chunks together


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
        p_rank_values = chunk_of(
            p_values, i_rank, i_chunk, row_units, K if BITS >= 16 else (K * BITS + 7) // 8
        )
        p_rank_scales = chunk_of(p_scales, i_rank, i_chunk, row_units, 2 if BITS == 2 else 1)
        p_rank_indices = chunk_of(
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
