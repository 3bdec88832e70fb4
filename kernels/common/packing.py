"""One bit an element, in 32-bit words: bit i of word w is element 32 * w + i."""

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
