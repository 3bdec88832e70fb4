"""Factored: two all-reduces of thin matrices.

What a rank decodes, left^T right, is linear in right where left is that of all ranks: so factors are added up
as they are, without decoding, and what they send does not grow with the number of ranks.

Source: Vogels, Karimireddy and Jaggi, "PowerSGD" (NeurIPS 2019), Algorithms 1 and 2; but residuals are what
a rank's own message leaves, not what the average does: those would grow without bound where data are unlike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.average import average_
from gck.collectives.cost import padded
from gck.collectives.hierarchical import all_gather, cut, reduce_scatter
from gck.collectives.scratch import Scratch
from gck.collectives.transports import Transport
from gck.factored import Factored

__all__ = ["factored"]


def factored(
    transport: Transport,
    compressors: Sequence[Factored],
    grads: Sequence[Tensor],
    errs: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    counters: Sequence[Tensor | None],
    divisor: int,
    memory: Scratch,
) -> tuple[list[Tensor], list[Tensor]]:
    """Reduces `grads` and returns flat fp32 results, and bases for the next step. All tensors share messages.

    Steps:
        1. Of every gradient and its worker residual: acc, and left, what acc has of the basis.
        2. All-reduce the lefts, in rank order and in fp32; all ranks make the same orthonormal rows of them.
        3. right is what acc has of these; the residual is acc less left^T right.
        4. All-reduce the rights; divide once by `divisor`, the ranks of all tiers, for a mean.
        5. Decode once.

    Args:
        compressors: of each gradient, bound to its shape.
        errs: None: no residual.
        bases: None: the first one.
    """
    shapes = [compressor.factors(grad.numel()) for compressor, grad in zip(compressors, grads, strict=True)]
    device = grads[0].device
    flat, lefts = _side_by_side([shape for shape, _ in shapes], device, memory)
    used, accs = [], []
    for compressor, grad, err, basis, (_, shape), left in zip(
        compressors, grads, errs, bases, shapes, lefts, strict=True
    ):
        basis = _usable(basis, shape)
        basis = compressor.basis(grad.numel(), device) if basis is None else basis.to(device)
        if err is None:  # x + (-0.0) is x for every x
            err = memory.empty((grad.numel(),), torch.float32, device).fill_(-0.0)
        compressor.project_(grad, err, basis, left)
        used.append(basis)
        accs.append(err)
    lefts = _views(_sum(transport, flat), [shape for shape, _ in shapes])
    flat, rights = _side_by_side([shape for _, shape in shapes], device, memory)
    for compressor, acc, left, right, counter in zip(compressors, accs, lefts, rights, counters, strict=True):
        compressor.orthonormalise_(left)
        compressor.back_project_(acc, left, right)
        compressor.settle_(acc, left, right, counter)
    flat = _sum(transport, flat)
    rights = _views(flat, [shape for _, shape in shapes])
    following = [
        compressor.next_basis(basis, right)
        for compressor, basis, right in zip(compressors, used, rights, strict=True)
    ]
    if divisor != 1:
        average_(flat, divisor)
    results = []
    for compressor, grad, left, right in zip(compressors, grads, lefts, rights, strict=True):
        result = memory.empty((grad.numel(),), torch.float32, device)
        compressor.product_(result, left, right)
        results.append(result)
    return results, following


def _usable(basis: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A basis that a step can start from: any of fp32 and this shape, since ranks need not have the same."""
    fits = isinstance(basis, Tensor) and basis.dtype == torch.float32 and tuple(basis.shape) == shape
    return basis.detach().contiguous() if fits and basis is not None else None


def _side_by_side(
    shapes: Sequence[tuple[int, int]], device: torch.device, memory: Scratch
) -> tuple[Tensor, list[Tensor]]:
    """Room for factors of these shapes in one vector, each at a multiple of 16 bytes; zeros."""
    flat = memory.zeros((sum(padded(rank * length) for rank, length in shapes),), torch.float32, device)
    return flat, _views(flat, shapes)


def _views(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([padded(rank * length) for rank, length in shapes])
    return [
        part[: rank * length].view(rank, length) for part, (rank, length) in zip(parts, shapes, strict=True)
    ]


def _sum(transport: Transport, flat: Tensor) -> Tensor:
    """The sum of all ranks' vectors, in rank order; a new tensor, also where there is one rank."""
    cuts = cut([flat.numel()], None, transport.world_size)
    (part,) = reduce_scatter(transport, [flat], cuts)
    (total,) = all_gather(transport, [part.add(0.0)], [torch.float32], cuts)
    return total
