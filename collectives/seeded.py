"""Seeded: values at places that all ranks choose alike are added up as they are, without decoding.

Where a seed says which entries travel, every rank's payload holds values of the same entries, in the same
order: they are a dense vector of k numbers, and their sum is one of k numbers, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.average import average_
from gck.collectives.hierarchical import all_gather, cut, reduce_scatter
from gck.collectives.scratch import Scratch
from gck.collectives.transports import Transport
from gck.compressor import Compressor, summed_of

__all__ = ["seeded"]


def seeded(
    transport: Transport,
    compressor: Compressor,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor | None],
    counters: Sequence[Tensor | None],
    divisor: int,
    memory: Scratch,
) -> list[Tensor]:
    """Reduces `grads` and returns flat fp32 results: the bits of `one_phase`. All tensors share messages.

    Steps:
        1. Compress every gradient with its worker residual, which becomes what was left out.
        2. Reduce-scatter the values: rank s adds up the s-th part of them, in rank order and in fp32.
        3. All-gather the sums, in fp32; divide once by `divisor`, the ranks of all tiers, for a mean.
        4. Decode once.
    """
    values: list[Tensor] = []
    for grad, err, counter in zip(grads, errs, counters, strict=True):
        layout = compressor.layout(grad.numel())
        body = memory.zeros((1, layout.nbytes), torch.uint8, grad.device)
        if grad.numel():
            compressor.compress_(grad, err, body, nonfinite=counter)
        values += layout.views(body[0])
    cuts = cut([each.numel() for each in values], None, transport.world_size)
    # One rank's own, too, are new tensors, and added to zeros.
    sums = [part.float().add(0.0) for part in reduce_scatter(transport, values, cuts)]
    sums = all_gather(transport, sums, [torch.float32] * len(sums), cuts)
    summed, results = summed_of(compressor), []
    for grad, total in zip(grads, sums, strict=True):
        if divisor != 1:
            average_(total, divisor)
        layout = summed.layout(grad.numel())
        body = memory.zeros((layout.nbytes,), torch.uint8, grad.device)
        for view in layout.views(body):
            view.copy_(total)
        result = memory.empty((grad.numel(),), torch.float32, grad.device)
        if grad.numel():
            summed.decompress_(result, body)
        results.append(result)
    return results
