"""No compression: an ordinary fp32 all-reduce, which sends what the residuals hold as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.average import average_
from gck.collectives.scratch import Scratch
from gck.collectives.transports import Transport
from gck.collectives.two_phase import Shards
from gck.compressor import Compressor, residual_of, server_of
from gck.error_feedback import ErrorFeedback

__all__ = ["dense"]


def dense(
    transport: Transport,
    compressor: Compressor,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    divisor: int,
    memory: Scratch,
) -> list[Tensor]:
    """Reduces `grads` in one message and returns flat fp32 results; no residual is left afterwards.

    Sums are divided by `divisor`. Residuals are read as `compressor` would, decayed and clipped. Those that
    are not allocated stay so: a dense warm-up costs no memory for them.
    """
    sizes = [grad.numel() for grad in grads]
    flat = memory.empty((sum(sizes),), torch.float32, grads[0].device)
    results = list(flat.split(sizes))
    for grad, state, acc in zip(grads, states, results, strict=True):
        acc.copy_(grad)
        if state is None:
            continue
        if state.worker is not None:
            acc.add_(residual_of(compressor, state.worker_for(grad, state.shard)))
        if state.server is not None and state.binding is not None:
            # The owner's residual is in units of the result: of the mean, where that was taken.
            shards = Shards.of(grad.numel(), state.binding.unit, transport.world_size)
            server = state.server_for(shards.numel, grad.device, state.binding)[
                : shards.valid(transport.rank)
            ]
            part = shards.part(acc, transport.rank)
            server = residual_of(server_of(compressor, transport.world_size), server)
            part.add_(server, alpha=divisor if state.divisor is None else state.divisor)
    transport.all_reduce(flat)
    if divisor != 1:
        average_(flat, divisor)
    for state in states:
        for residual in (state.worker, state.server) if state is not None else ():
            if residual is not None:
                residual.zero_()
    return results
