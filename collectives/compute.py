"""What an all-reduce costs beside its messages: the time to compress, to reduce and to decode, measured here.

`gck.collectives.cost` knows bytes and messages, which follow from the configuration; this does not, and is
the third term of its prediction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gck.collectives.all_reduce import all_reduce_
from gck.collectives.cost import choose_algorithm
from gck.collectives.transports import CallLog
from gck.compressor import Compressor, compressor_of_step, shard_numel
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError

__all__ = ["measure_compute"]


def measure_compute(
    compressor: Compressor,
    numel: int,
    world_size: int,
    algorithm: str = "auto",
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    before: Callable[[], None] | None = None,
) -> float:
    """Seconds of an all-reduce whose messages take no time: the `compute` of `Cost.seconds`.

    Calls `gck.all_reduce_` on this process alone, over a transport that gives a rank its own messages for
    those of all others; the copies of residuals that a failure would need are part of it. With error
    feedback, on normally distributed fp32. What a backend computes inside its own all-reduce, by which the
    dense algorithm goes, is not in.

    Ranks that share processors slow one another down: measure on all of them at once.

    Args:
        numel: elements of the gradient, at least 1; rounded up to whole shards.
        world_size: ranks of the all-reduce that is meant; nobody else needs to be there.
        repeats: the median counts, after one call that does not.
        before: called before every repeat, such as a barrier of ranks that share processors.

    Raises:
        ArgumentError: numel, world_size or repeats is below 1.
        Those of `gck.all_reduce_`, of compressor, algorithm and device.
    """
    for name, value in (("numel", numel), ("world_size", world_size), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"measure_compute: {name} must be a positive int, got {value!r}")
    # Of a world of one "auto" would make nothing at all; of the world that is meant it makes what it makes.
    if algorithm == "auto":
        algorithm = choose_algorithm(compressor, [numel], world_size)
    compressor = compressor_of_step(compressor, 0, 0)
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    # What others say of their shards is what this rank says of its own: none may be cut short.
    shard = shard_numel(numel, compressor.shard_unit, world_size)
    source = torch.randn(-(-numel // shard) * shard, generator=generator, device="cpu").to(device)
    grad, state, transport = source.clone(), ErrorFeedback(), _Echo(world_size)
    seconds = []
    for _ in range(repeats + 1):
        grad.copy_(source)
        if before is not None:
            before()
        _settle(device)
        began = time.perf_counter()
        all_reduce_(grad, state, compressor, transport, algorithm=algorithm, validate="off")
        _settle(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Echo:
    """Implements `Transport`: rank 0, who hears from every other rank what it says itself."""

    rank = 0

    def __init__(self, world_size: int, timeout: float = 60.0) -> None:
        self.world_size, self.timeout = world_size, timeout
        self.calls = CallLog()

    def with_timeout(self, seconds: float) -> _Echo:
        return _Echo(self.world_size, seconds)

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return send.expand(self.world_size, -1).clone()

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return send[:1].expand(self.world_size, -1).clone()

    def all_reduce(self, tensor: Tensor) -> None:
        """Leaves the tensor as it is."""

    def barrier(self) -> None: ...

    def synchronize(self) -> None: ...

    def abort(self, reason: str) -> None:
        self.calls.queue.end()
