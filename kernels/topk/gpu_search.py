"""Binary searches for keys by rank, among keys that one program holds."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def reach(b_key, key):
    """How many keys are at least `key`."""
    return tl.sum(tl.where(b_key >= key, 1, 0))  # over both axes at once: each thread first adds up its own


@triton.jit
def reach_both(b_key, key, other_key):
    """How many keys are at least `key`, and at least `other_key`, in one sum: both are below 32768."""
    both = tl.sum(tl.where(b_key >= key, 1, 0) + tl.where(b_key >= other_key, 65536, 0))
    return both & 0xFFFF, both >> 16


@triton.jit
def thirds(low, high):
    """Two keys that cut an interval of two or more in three."""
    third = tl.maximum((high - low) // 3, 1)
    return low + third, high - third


@triton.jit
def third_of(low, high, lower, upper, up, far_up):
    """(low, high) of what is left: from `upper` if enough keys reach it, or from `lower`, or below that."""
    kept = tl.where(up, upper, lower)
    return tl.where(far_up, upper, tl.where(up, lower, low)), tl.where(far_up, high, kept)


@triton.jit
def key_of_rank(b_key, rank, low, high, BITS: tl.constexpr):
    """The largest key that `rank` keys reach, without its BITS lowest bits; `rank` of them reach `low`, and
    fewer `high`. A step looks at two keys, which takes little longer than one, and leaves a third."""
    low >>= BITS
    high = ((high - 1) >> BITS) + 1
    while high - low > 1:
        lower, upper = thirds(low, high)
        there, above = reach_both(b_key, lower << BITS, upper << BITS)
        low, high = third_of(low, high, lower, upper, there >= rank, above >= rank)
    return low << BITS


@triton.jit
def keys_of_ranks(b_key, rank, low, high, reached, other_rank, other_low, other_high, BITS: tl.constexpr):
    """`key_of_rank` of two ranks, side by side: a step of the one does not wait for the other's. And how many
    keys reach the first of them; so many reach `low`."""
    low >>= BITS
    high = ((high - 1) >> BITS) + 1
    other_low >>= BITS
    other_high = ((other_high - 1) >> BITS) + 1
    while tl.maximum(high - low, other_high - other_low) > 1:
        middle = low + (high - low) // 2
        other_middle = other_low + (other_high - other_low) // 2
        there, other_there = reach_both(b_key, middle << BITS, other_middle << BITS)
        up, other_up = there >= rank, other_there >= other_rank
        # What has closed stays: its middle is its low end, which enough keys reach.
        low, high = tl.where(up, middle, low), tl.where(up, high, middle)
        reached = tl.where(up, there, reached)
        other_low = tl.where(other_up, other_middle, other_low)
        other_high = tl.where(other_up, other_high, other_middle)
    return low << BITS, reached, other_low << BITS


@triton.jit
def low_end(b_key, rank, near):
    """`near` if that many keys reach it, else 0: where to look for the key of that rank from."""
    near = tl.maximum(near, 0)
    return tl.where(reach(b_key, near) >= rank, near, 0)
