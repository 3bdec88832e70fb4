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
    lefts, used, accs = [], [], []
    for compressor, grad, err, basis in zip(compressors, grads, errs, bases, strict=True):
        numel, device = grad.numel(), grad.device
        shape, other = compressor.factors(numel)
        basis = _usable(basis, other)
        basis = compressor.basis(numel, device) if basis is None else basis.to(device)
        if err is None:  # x + (-0.0) is x for every x
            err = memory.empty((numel,), torch.float32, device).fill_(-0.0)
        left = memory.empty(shape, torch.float32, device)
        compressor.project_(grad, err, basis, left)
        lefts.append(left)
        used.append(basis)
        accs.append(err)
    lefts = _sums(transport, lefts)
    rights = []
    for compressor, acc, left, counter in zip(compressors, accs, lefts, counters, strict=True):
        compressor.orthonormalise_(left)
        right = memory.empty(compressor.factors(acc.numel())[1], torch.float32, acc.device)
        compressor.back_project_(acc, left, right)
        compressor.settle_(acc, left, right, counter)
        rights.append(right)
    rights = _sums(transport, rights)
    results, following = [], []
    for compressor, grad, left, right, basis in zip(compressors, grads, lefts, rights, used, strict=True):
        following.append(compressor.next_basis(basis, right))
        if divisor != 1:
            average_(right, divisor)
        layout = compressor.layout(grad.numel())
        body = memory.zeros((layout.nbytes,), torch.uint8, grad.device)
        for view, factor in zip(layout.views(body), (left, right), strict=True):
            view.copy_(factor.view(-1))
        result = memory.empty((grad.numel(),), torch.float32, grad.device)
        if grad.numel():
            compressor.decompress_(result, body)
        results.append(result)
    return results, following


def _usable(basis: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A basis that a step can start from: any of fp32 and this shape, since ranks need not have the same."""
    fits = isinstance(basis, Tensor) and basis.dtype == torch.float32 and tuple(basis.shape) == shape
    return basis.detach().contiguous() if fits and basis is not None else None


def _sums(transport: Transport, factors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of all ranks' factors, in rank order; new tensors, also where there is one rank."""
    flat = [factor.view(-1) for factor in factors]
    cuts = cut([each.numel() for each in flat], None, transport.world_size)
    sums = [part.add(0.0) for part in reduce_scatter(transport, flat, cuts)]
    sums = all_gather(transport, sums, [torch.float32] * len(sums), cuts)
    return [total.view(factor.shape) for total, factor in zip(sums, factors, strict=True)]
