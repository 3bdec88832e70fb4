"""Two phases: a compressed reduce-scatter, then a compressed all-gather.

Sends about two payloads a rank, a worker's and an owner's, whatever the number of ranks. Needs a compressor
that works on chunks (`shard_unit`), and keeps a residual in both phases.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed" (ICML 2021), section 5; Tang et al., "DoubleSqueeze" (ICML 2019), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gck.collectives.transports import Transport
from gck.compressor import Compressor, reduce_, server_of, shard_numel

__all__ = ["Shards", "two_phase"]


class Shards(NamedTuple):
    """How one tensor is cut: rank r owns elements [r * numel, r * numel + valid(r)).

    Attributes:
        total: elements of the tensor.
        numel: capacity of a shard; the last ones may be cut short or empty.
        unit: the compressor's chunk.
    """

    total: int
    numel: int
    unit: int

    @classmethod
    def of(cls, total: int, unit: int, world_size: int) -> Shards:
        return cls(total, shard_numel(total, unit, world_size), unit)

    def valid(self, rank: int) -> int:
        """Elements of the tensor that lie in the shard of `rank`."""
        return max(0, min(self.numel, self.total - rank * self.numel))

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """The shard of `rank` as a view."""
        start = min(rank * self.numel, self.total)
        return flat[start : start + self.valid(rank)]


def two_phase(
    transport: Transport,
    compressor: Compressor,
    unit: int,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor | None],
    server_errs: Sequence[Tensor | None],
    counters: Sequence[Tensor | None],
    divisor: int,
) -> list[Tensor]:
    """Reduces `grads` and returns flat fp32 results, the same bits on every rank.

    All tensors travel in one message a phase: row r of a message is one body a tensor, side by side.

    Steps, with W ranks:
        1. Cut every tensor into W shards of whole chunks and compress acc = fp32(grad) + err in one pass
           into W bodies; err becomes acc - decoded.
        2. All-to-all: shard s of every rank goes to rank s, its owner.
        3. The owner decodes the W bodies of its shard and adds them in rank order, in fp32.
        4. The owner divides by `divisor`: the only place where a mean is taken.
        5. The owner compresses the result with its server residual, by the compressor's `server_of`. Steps 3
           to 5 are one pass where the compressor can do them in one.
        6. All-gather the owners' bodies.
        7. Every rank, the owner too, decodes what was gathered: what the owner has more than its
           message is in its server residual.

    Args:
        unit: the compressor's shard_unit.
        errs: (numel,) fp32 each, overwritten, or None for no error feedback.
        server_errs: (shard numel,) fp32 each, overwritten in its valid part, or None.
        counters: (1,) int64 each, increased by residual entries cleared in either phase, or None.
        divisor: of the sums; the number of ranks, of all tiers, for a mean.
    """
    server = server_of(compressor, transport.world_size)
    rank, world_size, device = transport.rank, transport.world_size, grads[0].device
    shards = [Shards.of(grad.numel(), unit, world_size) for grad in grads]
    sizes = [compressor.layout(shard.numel).nbytes for shard in shards]

    send = torch.zeros(world_size, sum(sizes), dtype=torch.uint8, device=device)
    for grad, err, counter, bodies in zip(grads, errs, counters, send.split(sizes, 1), strict=True):
        if grad.numel():
            compressor.compress_(grad, err, bodies, nonfinite=counter)

    received = transport.all_to_all_bytes(send).split(sizes, 1)

    server_sizes = [server.layout(shard.numel).nbytes for shard in shards]
    reduced = torch.zeros(sum(server_sizes), dtype=torch.uint8, device=device)
    for shard, server_err, counter, bodies, slot in zip(
        shards, server_errs, counters, received, reduced.split(server_sizes), strict=True
    ):
        valid = shard.valid(rank)
        if not valid:
            continue
        reduce_(
            compressor,
            bodies,
            None if server_err is None else server_err[:valid],
            # A shard cut short by the vector's end has a shorter body; it lies at the start of its slot.
            slot[: server.layout(valid).nbytes],
            valid,
            capacity=shard.numel,
            divisor=divisor,
            nonfinite=counter,
        )

    gathered = transport.all_gather_bytes(reduced).split(server_sizes, 1)

    results = []
    for shard, slots in zip(shards, gathered, strict=True):
        result = torch.zeros(shard.total, dtype=torch.float32, device=device)
        for owner, slot in enumerate(slots):
            if shard.valid(owner):
                body = slot[: server.layout(shard.valid(owner)).nbytes]
                server.decompress_(shard.part(result, owner), body)
        results.append(result)
    return results
