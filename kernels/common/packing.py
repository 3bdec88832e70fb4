"""Narrow codes in words and bytes, little end first.

Bits: bit i of 32-bit word w is element 32 * w + i. Codes of 2, 4, 8 or 12 bits: code j of a row lies at bits
[j * BITS, (j + 1) * BITS) of the row's bytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def pack_bits(bits, WORDS: tl.constexpr):
    """A block of WORDS * 32 booleans, in any shape, to WORDS int32."""
    columns = tl.arange(0, 32).to(tl.uint32)[None, :]
    bits = tl.reshape(bits.to(tl.uint32), (WORDS, 32))
    return tl.sum(bits << columns, 1).to(tl.int32, bitcast=True)


@triton.jit
def unpack_bits(words):
    """(WORDS,) int32 to (WORDS, 32) int32 of 0 and 1."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def pack_codes(b_code, BITS: tl.constexpr):
    """(ROWS, SLOTS) int32 codes, of which the lower 8, 4 or 2 bits count, to rows of packed uint8."""
    ROWS: tl.constexpr = b_code.shape[0]
    EACH: tl.constexpr = 8 // BITS
    b_code &= 2**BITS - 1
    if EACH > 1:
        b_place = tl.arange(0, EACH)[None, None, :] * BITS
        b_code = tl.sum(tl.reshape(b_code, (ROWS, b_code.shape[1] // EACH, EACH)) << b_place, 2)
    return b_code.to(tl.uint8)


@triton.jit
def store_codes(p_rows, b_code, b_exists, BITS: tl.constexpr, K: tl.constexpr):
    """Packs (ROWS, SLOTS) int32 codes, 0 from slot K on, into rows of ceil(K * BITS / 8) bytes at p_rows.

    SLOTS is a power of two, at least 8; b_exists, (ROWS,), tells the rows to write.
    """
    ROWS: tl.constexpr = b_code.shape[0]
    SLOTS: tl.constexpr = b_code.shape[1]
    NBYTES: tl.constexpr = (K * BITS + 7) // 8
    p_row = p_rows + tl.arange(0, ROWS)[:, None] * NBYTES
    if BITS == 12:
        b_code &= 0xFFF
        b_pair = tl.arange(0, SLOTS // 2)[None, :] * 3
        b_place = tl.arange(0, 2)[None, None, :] * 12
        b_three = tl.sum(tl.reshape(b_code, (ROWS, SLOTS // 2, 2)) << b_place, 2)
        for i in tl.static_range(3):
            b_write = b_exists[:, None] & (b_pair + i < NBYTES)
            tl.store(p_row + b_pair + i, (b_three >> (8 * i)).to(tl.uint8), mask=b_write)
    else:
        b_byte = tl.arange(0, SLOTS * BITS // 8)[None, :]
        tl.store(p_row + b_byte, pack_codes(b_code, BITS), mask=b_exists[:, None] & (b_byte < NBYTES))


@triton.jit
def load_codes(p_rows, b_slot, b_live, BITS: tl.constexpr, K: tl.constexpr):
    """int32 codes of the slots b_slot, (1, SLOTS), of ROWS rows as `store_codes` packs them; 0 where not
    b_live, (ROWS, SLOTS)."""
    ROWS: tl.constexpr = b_live.shape[0]
    NBYTES: tl.constexpr = (K * BITS + 7) // 8
    p_byte = p_rows + tl.arange(0, ROWS)[:, None] * NBYTES + b_slot * BITS // 8
    b_code = tl.load(p_byte, mask=b_live, other=0).to(tl.int32)
    if BITS == 12:
        b_code |= tl.load(p_byte + 1, mask=b_live, other=0).to(tl.int32) << 8
    return (b_code >> (b_slot * BITS % 8)) & (2**BITS - 1)
