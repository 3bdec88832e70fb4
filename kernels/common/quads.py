"""Packed payloads to dense values, four neighbours at a time.

A thread owns quads: four elements that follow each other, which fp32 vectors move in 16 bytes, and whose
codes lie in one nibble, byte, half word or word. Neighbouring threads own neighbouring quads, so that what is
packed and what is dense are both read in order, and no value ever goes from one thread to another. Blocks of
quads are columns, (QUADS, 1), and those of their elements (QUADS, 4): the compiler then keeps the layout in
which a column is loaded for what is made of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

# An integer u below 2**23 in the low bits of this number makes 2**23 + u: faster than to convert it.
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)


@triton.jit
def quad_column(QUADS: tl.constexpr):
    """Numbers of quads. They count as not contiguous: else a thread would load the codes of several
    neighbours at once, and their values would have to move to where they are stored from."""
    return tl.max_contiguous(tl.arange(0, QUADS)[:, None], [1, 1])


@triton.jit
def quad_offsets(b_quad):
    return b_quad * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def load_code_quads(p_codes, b_quad, left, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """int32 whose low 4 * BITS bits are the codes, of 8, 4 or 2 bits, of each quad; 0 from element `left` on.

    WHOLE: all elements are below, and p_codes, to uint8, is aligned to what a quad takes.
    """
    NBYTES: tl.constexpr = BITS // 2  # a quad
    if WHOLE:
        if NBYTES == 4:
            return tl.load(p_codes.to(tl.pointer_type(tl.int32)) + b_quad)
        elif NBYTES == 2:
            return tl.load(p_codes.to(tl.pointer_type(tl.int16)) + b_quad).to(tl.int32)
        else:
            return tl.load(p_codes + b_quad).to(tl.int32)
    else:
        last = (left * BITS + 7) // 8
        b_word = tl.zeros(b_quad.shape, tl.int32)
        for i in tl.static_range(NBYTES):
            b_byte = b_quad * NBYTES + i
            b_word |= tl.load(p_codes + b_byte, mask=b_byte < last, other=0).to(tl.int32) << (8 * i)
        return b_word


@triton.jit
def signed_codes(b_word, BITS: tl.constexpr):
    """(QUADS, 4) fp32 of two's complement codes."""
    SIGN: tl.constexpr = 2 ** (BITS - 1)
    b_place = tl.arange(0, 4)[None, :] * BITS
    b_code = ((b_word >> b_place) & (2**BITS - 1)) ^ SIGN
    return (b_code | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + SIGN)


@triton.jit
def bits_of(b_word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """(QUADS, 4) booleans: bit PLACE of each of the four codes."""
    b_place = tl.arange(0, 4)[None, :] * BITS + PLACE
    return ((b_word >> b_place) & 1) != 0
