"""Selected or dense values as codes of a few bits and fp32 scales; rows are what shares a scale."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, canonical, magnitude_key, negated
from gck.kernels.common.tree import halving_sum

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even


@triton.jit
def scaled_codes(b_acc, b_live, BITS: tl.constexpr, b_uniform=None):
    """(codes, scale of each row, decoded) of symmetric codes: multiples of the largest / QMAX.

    Rounded to nearest even; or, given numbers of [0, 1), away from 0 where they lie below the fraction.
    """
    QMAX: tl.constexpr = 2.0 ** (BITS - 1) - 1
    b_top = tl.max(tl.where(b_live, magnitude_key(b_acc), 0), 1)
    b_scale = b_top.to(tl.float32, bitcast=True)
    b_scale = canonical(tl.div_rn(b_scale, tl.full(b_scale.shape, QMAX, tl.float32)))
    b_scale = tl.where(b_scale < SMALLEST_NORMAL, 0.0, b_scale)
    b_zero = b_scale == 0
    b_inverse = tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), tl.where(b_zero, 1.0, b_scale))
    b_code = b_acc * b_inverse[:, None]
    if b_uniform is None:
        b_code = b_code + MAGIC - MAGIC
    else:
        b_size = tl.abs(b_code)
        # Not tl.floor, which flushes denormals.
        b_whole = b_size + MAGIC - MAGIC
        b_whole = tl.where(b_whole > b_size, b_whole - 1.0, b_whole)
        b_size = b_whole + tl.where(b_uniform < b_size - b_whole, 1.0, 0.0)
        # Not a negation: -0 would change the residual of -0.
        b_code = tl.where(b_acc >= 0, b_size, 0.0 - b_size)
    b_code = tl.minimum(tl.maximum(b_code, -QMAX), QMAX)
    b_code = tl.where(b_zero[:, None], 0.0, b_code)
    b_code = tl.where((b_top < INFINITY)[:, None], b_code, tl.where(b_acc >= 0, QMAX, -QMAX))
    b_code = tl.where(b_live, b_code, 0.0)
    return b_code.to(tl.int32), b_scale, b_code * b_scale[:, None]


@triton.jit
def _mean(b_magnitude, b_count, LEVELS: tl.constexpr):
    ROWS: tl.constexpr = b_magnitude.shape[0]
    return canonical(tl.div_rn(halving_sum(b_magnitude, ROWS, LEVELS), tl.maximum(b_count, 1).to(tl.float32)))


@triton.jit
def two_level_codes(b_acc, b_live, b_wanted, LEVELS: tl.constexpr):
    """(codes, low and high level of each row, decoded): the means of what lies below the mean, and not."""
    b_magnitude = tl.abs(b_acc)
    b_mean = _mean(tl.where(b_live, b_magnitude, 0.0), b_wanted, LEVELS)
    b_is_high = b_live & (b_magnitude >= b_mean[:, None])
    b_is_low = b_live & (b_is_high == 0)
    b_highs = tl.sum(b_is_high.to(tl.int32), 1)
    b_high = _mean(tl.where(b_is_high, b_magnitude, 0.0), b_highs, LEVELS)
    b_low = _mean(tl.where(b_is_low, b_magnitude, 0.0), b_wanted - b_highs, LEVELS)
    # A group without members takes the level of the other one.
    b_high = tl.where(b_highs > 0, b_high, b_low)
    b_low = tl.where(b_highs < b_wanted, b_low, b_high)
    b_positive = b_acc >= 0
    b_code = tl.where(b_live, b_positive.to(tl.int32) * 2 + b_is_high.to(tl.int32), 0)
    b_level = tl.where(b_is_high, b_high[:, None], b_low[:, None])
    return b_code, b_low, b_high, tl.where(b_positive, b_level, negated(b_level))
