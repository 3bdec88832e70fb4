"""What hooks know of a model's parameters, and how they tell it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor

from gck.compressor import Compressor, describe
from gck.factored import shaped

__all__ = ["overview", "stored_shape"]


def stored_shape(parameter: Any) -> list[int]:
    """The dimensions of a parameter, or of this rank's shard of it, in their order in memory."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    strides = local.stride()
    order = list(range(local.dim()))
    if not local.is_contiguous():
        order.sort(key=lambda dim: -strides[dim])
    return [local.shape[dim] for dim in order]


def overview(chosen: Iterable[tuple[Tensor, Compressor | None]]) -> list[str]:
    """Of each compressor, and of none, how many parameters it has and what their payloads take: a line each.

    Args:
        chosen: parameters with what compresses their gradients.
    """
    groups: dict[int, tuple[Compressor | None, list[Sequence[int]]]] = {}
    for parameter, compressor in chosen:
        groups.setdefault(id(compressor), (compressor, []))[1].append(stored_shape(parameter))
    lines = []
    for compressor, shapes in sorted(groups.values(), key=lambda group: group[0] is None):
        numel = sum(map(prod, shapes))
        line = f"{len(shapes)} parameters, {numel:,} elements"
        if compressor is None:
            lines.append(f"not compressed: {line}")
            continue
        nbytes = sum(shaped(compressor, shape).layout(prod(shape)).nbytes for shape in shapes)
        bits = 8 * nbytes / max(numel, 1)
        more = ", more than fp32 without compression" if bits > 32 else ""
        lines.append(f"{describe(compressor)}: {line}, {bits:.2f} bits each{more}")
    return lines
