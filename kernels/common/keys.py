"""Device helpers on the bits of floating-point numbers.

Every backend must make the same bytes, so that what hardware leaves open is settled on the bits: which
NaN an operation returns, and how the narrow types round.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

# Magnitude keys: the bits of |x| as an integer order as |x| does, with NaN above infinity.
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def magnitude_key(x):
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def negated(x):
    """-x, which Triton 3.6 takes for 0 - x: of 0 that is 0, and not -0."""
    return x * -1.0


@triton.jit
def is_finite(x):
    return magnitude_key(x) < INFINITY


@triton.jit
def canonical(x):
    """fp32 `x` with every NaN replaced by the one quiet NaN."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where((bits & MAGNITUDE) > INFINITY, QUIET_NAN, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """fp32 of `x`, exactly."""
    if x.dtype == tl.bfloat16:
        # On the bits, because the interpreter flushes denormals.
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def accumulate(grad, err):
    """acc = fp32(grad) + err in one rounding, with one NaN."""
    return canonical(widen(grad) + err)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Canonical fp32 `x` in dtype, rounded to nearest even; too large becomes infinity."""
    if dtype == tl.bfloat16:
        # On the bits, because the interpreter truncates. A carry out of the mantissa is what is
        # wanted, infinities stay, and the canonical NaN has no low bits to carry from.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        # Hardware turns any NaN into 0x7fff; the canonical one is 0x7e00.
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(x == x, bits, 0x7E00).to(tl.int16)
        return bits.to(tl.float16, bitcast=True)
    else:
        return x


@triton.jit
def count_cleared(p_nonfinite, b_cleared):
    """Adds the number of entries in b_cleared, (ROWS, COLUMNS) or (N,), to the counter."""
    cleared = tl.sum(tl.reshape(b_cleared.to(tl.int32), (b_cleared.numel,)), 0)
    if cleared > 0:
        tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")
