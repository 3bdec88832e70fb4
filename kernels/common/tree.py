"""Sums whose order is part of the contract."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def halving_sum(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Sums each row of a (ROWS, 2**LEVELS) block: adds the upper half to the lower half, repeats.

    A reduction of two elements has one result whatever order the compiler gives it, unlike `tl.sum`
    over the row.
    """
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (ROWS, 2, 2 ** (LEVELS - 1 - level))), 1)
    return tl.reshape(x, (ROWS,))
