"""The threshold itself, from the few keys that were set apart because it is one of them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.topk.gpu_control import LAST_KEY, QUOTA, THRESHOLD
from gck.kernels.topk.gpu_search import reach_both, third_of, thirds


@triton.jit
def _add_winners(
    p_rows,
    p_groups,
    p_near,
    first,
    count,
    threshold,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
):
    b_slot = first + tl.arange(0, PART)
    b_inside = b_slot < count
    b_key = tl.load(p_near + b_slot, mask=b_inside, other=-1, cache_modifier=".cg")
    b_row = tl.load(p_near + SIZE + b_slot, mask=b_inside, other=0, cache_modifier=".cg")
    b_wins = b_key >= threshold
    b_tie = (b_key == threshold).to(tl.int32)
    tl.atomic_add(p_rows + b_row, tl.where(b_tie > 0, 65536, 1), mask=b_wins, sem="relaxed")
    b_one = tl.full((PART,), 1, tl.int64)
    tl.atomic_add(p_groups + 2 * (b_row // GROUP) + b_tie, b_one, mask=b_wins, sem="relaxed")


@triton.jit
def _threshold(p_near, first_key, stop_key, count, wanted, SIZE: tl.constexpr):
    """(the `wanted`-th of the `count` keys set apart, how many lie above it)"""
    tl.static_assert(SIZE < 2**15)
    b_slot = tl.arange(0, SIZE)
    b_inside = b_slot < count
    b_key = tl.load(p_near + b_slot, mask=b_inside, other=-1, cache_modifier=".cg")
    low, high, reach = first_key, stop_key, count.to(tl.int32)
    while (high - low > 1) & (reach > wanted):
        lower, upper = thirds(low, high)
        there, above = reach_both(b_key, lower, upper)
        up, far_up = there >= wanted, above >= wanted
        low, high = third_of(low, high, lower, upper, up, far_up)
        reach = tl.where(far_up, above, tl.where(up, there, reach))
    # Exactly as many as are wanted may have been found before the interval closed.
    threshold = tl.min(tl.where(b_key >= low, b_key, LAST_KEY), 0)
    return threshold, tl.sum((b_key > threshold).to(tl.int32), 0)


@triton.jit
def pick_threshold(
    p_rows,
    p_groups,
    p_control,
    p_near,
    first_key,
    stop_key,
    count,
    wanted,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Picks the `wanted`-th of the keys set apart, and adds those that win, and tie, to the counts."""
    PART: tl.constexpr = SIZE // 4
    if count <= PART:  # a search through few takes half the time
        threshold, above = _threshold(p_near, first_key, stop_key, count, wanted, PART)
    else:
        threshold, above = _threshold(p_near, first_key, stop_key, count, wanted, SIZE)
    tl.store(p_control + THRESHOLD, threshold.to(tl.int64))
    tl.store(p_control + QUOTA, wanted - above)
    for first in range(0, count.to(tl.int32), PART):  # anew, because all of them take all registers
        _add_winners(p_rows, p_groups, p_near, first, count, threshold, GROUP, SIZE, PART)
