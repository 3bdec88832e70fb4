"""Sums to means, with one rounding on every device."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


def division(divisor: int) -> tuple[float, str]:
    """(number, kind) for `divided`. The inverse of a power of two is exact: the product rounds alike."""
    if divisor == 1:
        return 1.0, "none"
    if divisor & (divisor - 1) == 0:
        return 1 / divisor, "product"
    return float(divisor), "quotient"


@triton.jit
def divided(x, number, KIND: tl.constexpr):
    """x / divisor, where (number, KIND) is what `division` says of the divisor."""
    if KIND == "none":
        return x
    elif KIND == "product":
        return x * number
    else:
        return tl.div_rn(x, tl.zeros_like(x) + number)
