"""Rows of a body: codes, scales and positions of what was selected, and what stays of it in err."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.codes import scaled_codes, two_level_codes
from gck.kernels.common.keys import canonical, count_cleared, is_finite, round_to, widen
from gck.kernels.common.packing import store_codes


@triton.jit
def chunk_of(p_field, i_shard, i_chunk, row_units, COUNT: tl.constexpr):
    """Where COUNT elements a chunk lie in rows of bodies that are row_units * 16 bytes apart."""
    UNIT: tl.constexpr = 128 // p_field.dtype.element_ty.primitive_bitwidth
    return p_field + i_shard * row_units * UNIT + i_chunk * COUNT


@triton.constexpr_function
def values_of(k, bits):
    """Elements of a chunk's row of values; `ChunkTopK.row` says the same of all fields."""
    return k if bits >= 16 else (k * bits + 7) // 8


@triton.constexpr_function
def scales_of(bits):
    return 2 if bits == 2 else 1


@triton.constexpr_function
def indices_of(k, index_bits):
    return k if index_bits == 16 else (k * 12 + 7) // 8


@triton.jit
def encode(
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
    STRIDE: tl.constexpr,
):
    """Writes the rows of chunks whose b_wanted positions are known, and the residuals of those entries.

    All pointers are those of the first chunk; the positions of two chunks begin STRIDE apart; err holds acc.
    """
    ROWS: tl.constexpr = b_wanted.shape[0]
    SLOTS: tl.constexpr = 2**SLOT_LEVELS
    b_row = tl.arange(0, ROWS)
    b_slot = tl.arange(0, SLOTS)[None, :]
    b_exists = b_wanted > 0
    b_live = b_slot < b_wanted[:, None]
    b_write = b_exists[:, None] & (b_slot < K)
    b_entry = b_row[:, None] * K + b_slot
    b_position = tl.load(p_position + b_row[:, None] * STRIDE + b_slot, mask=b_live, other=0)
    b_position = b_position.to(tl.int32) & 0xFFFF
    p_entry = p_err + b_row[:, None] * 2**LEVELS + b_position
    b_acc = canonical(tl.load(p_entry, mask=b_live, other=0.0))
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
    b_cleared = b_live & (is_finite(b_residual) == 0)
    tl.store(p_entry, tl.where(b_cleared, 0.0, b_residual), mask=b_live)
    count_cleared(p_nonfinite, b_cleared)


@triton.jit
def clear_rest(p_err, p_nonfinite, left, STEP: tl.constexpr):
    """Of what is not finite nothing stays, not even what was not selected."""
    for first in range(0, left, STEP):
        b_local = first + tl.arange(0, STEP)
        b_inside = b_local < left
        b_cleared = b_inside & (is_finite(tl.load(p_err + b_local, mask=b_inside, other=0.0)) == 0)
        tl.store(p_err + b_local, tl.zeros((STEP,), tl.float32), mask=b_cleared)
        count_cleared(p_nonfinite, b_cleared)
