"""The exact k-th key of a block, by bisection, and the places of those that win."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def halve(b_low, b_high, b_at_low, b_above, b_middle, b_reach, b_wanted):
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
def ranked(b_key, low, quota, AXIS: tl.constexpr):
    """(which keys win, slots of those): what is above low, and the first `quota` of what equals it."""
    # One scan ranks both classes: 1 for what lies above the last key, 65536 for what equals it.
    b_class = tl.where(b_key > low, 1, tl.where(b_key == low, 65536, 0))
    b_rank = tl.cumsum(b_class, AXIS)
    b_ties = b_rank >> 16
    b_wins = (b_class == 1) | ((b_class > 1) & (b_ties <= quota))
    return b_wins, (b_rank & 0xFFFF) + tl.minimum(b_ties, quota) - 1
