"""Two phases: a compressed reduce-scatter, then a compressed all-gather.

Sends about two payloads a rank, a worker's and an owner's, whatever the number of ranks. Needs a compressor
that works on chunks (`shard_unit`), and keeps a residual in both phases.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed" (ICML 2021), section 5; Tang et al., "DoubleSqueeze" (ICML 2019), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gck.collectives.pieces import Decoding, Keep, Piece, Slice, cut, in_one_call, pipelined
from gck.collectives.scratch import Scratch
from gck.collectives.transports import (
    Started,
    Transport,
    rotation,
    start_all_to_all,
    start_all_to_all_as_made,
)
from gck.collectives.undo import Undo
from gck.compressor import Compressor, compressor_at, decompress_shards_, reduce_, server_of, shard_numel
from gck.errors import ArgumentError

__all__ = ["Residuals", "Shards", "two_phase"]

Message = list[tuple[Slice, Tensor]]  # of each part the bodies, a row for each owner


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
    grads: Sequence[Tensor],
    residuals: Residuals,
    results: Sequence[Tensor],
    divisor: int,
    piece_numel: int = 0,
    *,
    memory: Scratch,
    keep: Keep | None = None,
) -> Callable[[], None]:
    """Reduces `grads` to `results`, the same bits on every rank.

    All tensors travel in one message a phase: row r of a message is one body a tensor, side by side. Or they
    are cut into pieces with messages of their own, which overlap: see `gck.collectives.pieces`. The bits are
    the same, since chunks are compressed by themselves and added in rank order.

    Steps, with W ranks:
        1. Cut every tensor into W shards of whole chunks and compress acc = fp32(grad) + err in one pass
           into W bodies; err becomes acc - decoded.
        2. All-to-all: shard s of every rank goes to rank s, its owner. Large bodies are compressed one by
           one, in the order in which they are sent, and the next is made while one is on the wire.
        3. The owner decodes the W bodies of its shard and adds them in rank order, in fp32.
        4. The owner divides by `divisor`: the only place where a mean is taken.
        5. The owner compresses the result with its server residual, by the compressor's `server_of`. Steps 3
           to 5 are one pass where the compressor can do them in one.
        6. All-gather the owners' bodies.
        7. Every rank, the owner too, decodes what was gathered: what the owner has more than its
           message is in its server residual.

    Args:
        compressor: one with a `shard_unit`.
        results: (numel,) fp32 each, overwritten. The gradients themselves where there is a `keep`.
        divisor: of the sums; the number of ranks, of all tiers, for a mean.
        piece_numel: elements a piece, of all shards together; 0: one piece.
        memory: where what is sent is made.
        keep: see `gck.collectives.pieces.Decoding`.

    Returns:
        what is left of step 7, when nothing can fail any more; it may be called more than once.
    """
    rank, world_size = transport.rank, transport.world_size
    unit = compressor.shard_unit
    if unit is None:
        raise ArgumentError(f"two_phase: {compressor} cannot be cut into shards")
    shards = [Shards.of(grad.numel(), unit, world_size) for grad in grads]
    # Decoding writes all of the results: every element has one owner.
    pieces = cut([shard.numel for shard in shards], unit, world_size, piece_numel)
    # Of the configuration alone: bodies of a shard that the vector's end cuts short are as short.
    cuts_short = compressor_at(compressor, 0) is not None
    job = _Job(compressor, rank, world_size, shards, grads, residuals, results, divisor, cuts_short, memory)
    decoding = Decoding(job.decode, job.places, results, keep)
    if not in_one_call(transport, pieces, job.compress, job.reduce, decoding):
        pipelined(transport, pieces, partial(job.start, transport), job.reduce, decoding)
    return decoding.finish


class Residuals(NamedTuple):
    """What changes as tensors are compressed, of each.

    Attributes:
        workers: (numel,) fp32, overwritten, or None for no error feedback.
        servers: (shard numel,) fp32, overwritten in its valid part, or None.
        counters: (1,) int64, increased by residual entries cleared in either phase, or None.
        undo: whose `worker` and `server` are told before any of their elements change, once of each.
    """

    workers: Sequence[Tensor | None]
    servers: Sequence[Tensor | None]
    counters: Sequence[Tensor | None]
    undo: Sequence[Undo]


class _Job(NamedTuple):
    """What the steps work on: of each tensor its shards, gradient, residuals and result."""

    compressor: Compressor
    rank: int
    world_size: int
    shards: Sequence[Shards]
    grads: Sequence[Tensor]
    residuals: Residuals
    results: Sequence[Tensor]
    divisor: int
    cuts_short: bool
    memory: Scratch

    def _rows_pay(self, piece: Piece) -> bool:
        """Whether the bodies of owners are compressed one by one, so that one is on the wire while the next
        is made: where they are large, and on the host, where a call costs little."""
        if self.world_size == 1 or self.grads[0].device.type != "cpu" or not self.cuts_short:
            return False
        nbytes = sum(self.compressor.layout(part.numel).nbytes for part in piece)
        return nbytes >= rotation.ROTATE_FROM

    def start(self, transport: Transport, piece: Piece) -> Started:
        """Steps 1 and 2 of a piece."""
        if self._rows_pay(piece):
            send, bodies = self._message(piece)
            return start_all_to_all_as_made(transport, send, partial(self._compress_row, bodies))
        return start_all_to_all(transport, self.compress(piece))

    def compress(self, piece: Piece) -> Tensor:
        """Step 1 of a piece."""
        send, bodies = self._message(piece)
        self._compress(bodies)
        return send

    def _message(self, piece: Piece) -> tuple[Tensor, Message]:
        """Room for what a piece sends: a row for each owner, and in it a body for each part."""
        sizes = [self.compressor.layout(part.numel).nbytes for part in piece]
        send = self._zeros(self.world_size, sum(sizes))
        return send, list(zip(piece, send.split(sizes, 1), strict=True))

    def _compress(self, message: Message) -> None:
        for part, bodies in message:
            shard, total = self.shards[part.tensor].numel, self.grads[part.tensor].numel()
            # Whole shards in one pass; one that is cut short by itself, since its body is shorter.
            together = 0 if not self._whole(part) else total // shard if self.cuts_short else self.world_size
            if together:
                grad, err, counter, keep = self._of(part)
                end = min(together * shard, total)
                keep(0, end)
                self.compressor.compress_(
                    grad[:end],
                    None if err is None else err[:end],
                    bodies[:together],
                    nonfinite=counter,
                )
            for owner in range(together, self.world_size):
                self._compress_for(owner, part, bodies[owner])

    def _compress_row(self, message: Message, owner: int) -> None:
        for part, bodies in message:
            self._compress_for(owner, part, bodies[owner])

    def _compress_for(self, owner: int, part: Slice, body: Tensor) -> None:
        valid = self._valid(part, owner)
        if not valid:
            return
        grad, err, counter, keep = self._of(part)
        first = owner * self.shards[part.tensor].numel + part.start
        compressor = self._at(first)
        keep(first, first + valid)
        compressor.compress_(
            grad[first : first + valid],
            None if err is None else err[first : first + valid],
            body[: compressor.layout(valid).nbytes].unsqueeze(0),
            nonfinite=counter,
        )

    def _of(self, part: Slice) -> tuple[Tensor, Tensor | None, Tensor | None, Callable[[int, int], None]]:
        workers, _, counters, undo = self.residuals
        i = part.tensor
        return self.grads[i], workers[i], counters[i], undo[i].worker.keep

    def reduce(self, piece: Piece, received: Tensor) -> Tensor:
        """Steps 3 to 5: the body of what this rank owns of a piece, from what came for it."""
        server = server_of(self.compressor, self.world_size)
        sizes = [self.compressor.layout(part.numel).nbytes for part in piece]
        server_sizes = [server.layout(part.numel).nbytes for part in piece]
        reduced = self._zeros(sum(server_sizes))
        rows = zip(piece, received.split(sizes, 1), reduced.split(server_sizes), strict=True)
        for part, bodies, slot in rows:
            valid = self._valid(part, self.rank)
            if not valid:
                continue
            capacity = valid if self.cuts_short else part.numel
            err = self.residuals.servers[part.tensor]
            self.residuals.undo[part.tensor].server.keep(part.start, part.start + valid)
            reduce_(
                self.compressor if self._whole(part) else self._at(part.start),
                bodies[:, : self.compressor.layout(capacity).nbytes],
                None if err is None else err[part.start : part.start + valid],
                # A shard cut short by the vector's end has a shorter body; it lies at the start of its slot.
                slot[: server.layout(valid).nbytes],
                valid,
                capacity=capacity,
                divisor=self.divisor,
                nonfinite=self.residuals.counters[part.tensor],
            )
        return reduced

    def decode(self, piece: Piece, gathered: Tensor) -> None:
        """Step 7: a piece of the results, from the owners' bodies."""
        server = server_of(self.compressor, self.world_size)
        server_sizes = [server.layout(part.numel).nbytes for part in piece]
        for part, slots in zip(piece, gathered.split(server_sizes, 1), strict=True):
            if self._whole(part):
                decompress_shards_(server, self.results[part.tensor], slots, part.numel)
                continue
            for owner, slot in enumerate(slots):
                valid = self._valid(part, owner)
                if valid:
                    first = owner * self.shards[part.tensor].numel + part.start
                    out = self.results[part.tensor][first : first + valid]
                    server.decompress_(out, slot[: server.layout(valid).nbytes])

    def places(self, piece: Piece) -> Iterator[tuple[int, int, int]]:
        """What `decode` writes of a piece: of tensor i elements [start, stop)."""
        for part in piece:
            for owner in range(self.world_size):
                first = owner * self.shards[part.tensor].numel + part.start
                yield part.tensor, first, first + self._valid(part, owner)

    def _zeros(self, *shape: int) -> Tensor:
        return self.memory.zeros(shape, torch.uint8, self.results[0].device)

    def _whole(self, part: Slice) -> bool:
        """Whether it is all of a tensor, which is compressed in one pass."""
        return part.numel == self.shards[part.tensor].numel

    def _valid(self, part: Slice, owner: int) -> int:
        """Elements of the tensor that lie in the slice of `owner`."""
        return max(0, min(part.numel, self.shards[part.tensor].valid(owner) - part.start))

    def _at(self, start: int) -> Compressor:
        """The compressor for chunks from element `start` on."""
        part = compressor_at(self.compressor, start)
        if part is None:
            raise ArgumentError(f"two_phase: {self.compressor} cannot be cut into pieces")
        return part
