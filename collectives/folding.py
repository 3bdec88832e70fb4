"""Server residuals that a call has no use for: they go to the workers, so that they are sent.

Two phases leave a server residual, cut into chunks of the compressor's size. A call that goes by another
algorithm, or by two phases of other chunks, would leave it where it is for ever.
"""

from __future__ import annotations

from torch import Tensor

from gck.collectives.transports import Transport
from gck.collectives.two_phase import Shards
from gck.error_feedback import ErrorFeedback, ServerBinding, ShardBinding

__all__ = ["fold_server"]


def fold_server(
    state: ErrorFeedback,
    grad: Tensor,
    shard: ShardBinding | None,
    kept: ServerBinding | None,
    transport: Transport,
    divisor: int,
) -> None:
    """Adds the server residual, which is in units of the result, `divisor` times to the worker residual, of
    which this rank owns that part, and drops it. Nothing happens where there is none, or it is `kept`, and of
    sums that were divided by the same.

    The state gets a new worker residual: what undoes a call that fails puts the old ones back.

    Args:
        grad, shard: as of `ErrorFeedback.worker_for`.
        kept: what the call's own server residual belongs to; None: it has none.
        divisor: of the call's sum; the number of ranks, of all tiers, for a mean.
    """
    was = divisor if state.divisor is None else state.divisor
    if state.server is None or state.binding is None or (state.binding == kept and was == divisor):
        return
    shards = Shards.of(grad.numel(), state.binding.unit, transport.world_size)
    worker = state.worker_for(grad, shard).clone()
    part = shards.part(worker, transport.rank)
    # Not by alpha, whose product some devices round and others do not.
    part.add_(state.server.to(part.device)[: part.numel()] * was)
    state.worker, state.server, state.binding = worker, None, None
