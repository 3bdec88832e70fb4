"""Pieces of an all-reduce: while some are on the wire, others are compressed and decoded.

A piece takes the same elements of every rank's shard, so that who owns what does not depend on the pieces.
Source: the chunks of a pipelined reduction in Thakur, Rabenseifner and Gropp, "Optimization of Collective
Communication Operations in MPICH" (2005), section 4, over compressed messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gck.collectives.cost import Link, all_reduce_cost
from gck.collectives.failure import give_up, on_all_ranks
from gck.collectives.transports import (
    Started,
    Transport,
    await_peers,
    expect_all_gathers,
    start_all_gather,
)
from gck.compressor import Compressor, check_compressor, compressor_at, previews, shard_numel
from gck.errors import ArgumentError, DtypeError
from gck.values import plain_int, shown

__all__ = [
    "Decoding",
    "Keep",
    "Piece",
    "Slice",
    "check_piece_numel",
    "choose_piece_numel",
    "count_pieces",
    "cut",
    "gathered",
    "in_one_call",
    "piece_numel_of",
    "pipelined",
]


SLOW = 7e-9  # seconds that a link takes for the bytes of an element; computing takes 1e-9 to 5e-9
MOST = 8  # pieces that are chosen
UNDER_WAY = 16  # pieces, whoever chose them: each may have a thread
LEAST = 30 << 10  # bytes of a piece's message
SHORTEST = 2.4e-3  # seconds that it takes; less, and its rounds and calls take longer than what they hide


class Slice(NamedTuple):
    """Elements [start, start + numel) of every rank's shard of one tensor.

    Attributes:
        tensor: its place among the tensors that are reduced together.
        start, numel: whole chunks, but where a world of one ends with the vector.
    """

    tensor: int
    start: int
    numel: int


Piece = list[Slice]
Keep = Sequence[Callable[[int, int], None]]


def check_piece_numel(function: str, piece_numel: object) -> None:
    """Raises unless `piece_numel` is None or a number of elements.

    Raises:
        DtypeError: it is neither None nor an int.
        ArgumentError: it is negative.
    """
    if piece_numel is None:
        return
    if isinstance(piece_numel, bool) or not isinstance(piece_numel, int):
        raise DtypeError(f"{function}: piece_numel must be an int or None, got {shown(piece_numel)}")
    if piece_numel < 0:
        raise ArgumentError(f"{function}: piece_numel must be at least 0, got {piece_numel}")


def choose_piece_numel(
    compressor: Compressor,
    numel: int,
    world_size: int,
    device_type: str = "cpu",
    *,
    link: Link | None = None,
    algorithm: str = "auto",
) -> int:
    """Elements a piece when `numel` elements are reduced; 0: all at once. Of the arguments alone.

    Pieces hide the time to compute behind that of a slow link, and cost more of it: each is a few calls and
    rounds. They pay where bytes take longer than computing does, by docs/collectives.md's measurements from
    `SLOW` on, as long as a message keeps `LEAST` bytes and takes `SHORTEST`. Not on devices, in worlds of
    one, or for compressors whose vectors cannot be cut; for one of these that previews (see
    `gck.compressor.preview_`) all is one piece, which says that links are slow.

    Args:
        numel: elements; between nodes of L ranks those of a shard, an L-th.
        world_size: ranks; or nodes.
        link: what ranks are connected by, the same on all of them. None: nobody knows, and it is 0.
        algorithm: that of the all-reduce.

    Raises:
        DtypeError: compressor is no Compressor, numel or world_size no int, or link no Link.
        ArgumentError: numel below 0, world_size below 1, or algorithm unknown or not for this compressor.
    """
    function = "choose_piece_numel"
    check_compressor(function, compressor)
    numel, world_size = plain_int(numel), plain_int(world_size)
    for name, value, least in (("numel", numel, 0), ("world_size", world_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
        if value < least:
            raise ArgumentError(f"{function}: {name} must be at least {least}, got {value}")
    if link is not None and not isinstance(link, Link):
        raise DtypeError(f"{function}: link must be a Link or None, got {shown(link)}")
    if link is None or world_size == 1 or device_type != "cpu" or not numel:
        return 0
    unit, cost = compressor.shard_unit, all_reduce_cost(compressor, [numel], world_size, algorithm)
    slow = cost.nbytes / link.bandwidth >= SLOW * numel
    if not slow or cost.algorithm not in ("one_phase", "two_phase"):
        return 0
    if unit is None or compressor_at(compressor, 0) is None:
        return numel if previews(compressor) else 0
    shards = world_size if cost.algorithm == "two_phase" else 1
    message = compressor.layout(shard_numel(numel, unit, shards)).nbytes
    pieces = min(message // LEAST, int(message / link.bandwidth / SHORTEST), MOST)
    return -(-numel // pieces) if pieces > 1 else 0


def count_pieces(
    compressor: Compressor,
    numel: int,
    world_size: int,
    link: Link,
    algorithm: str = "auto",
    device_type: str = "cpu",
) -> int:
    """How many pieces `choose_piece_numel` means, at least 1: for `Cost.seconds`."""
    piece = choose_piece_numel(compressor, numel, world_size, device_type, link=link, algorithm=algorithm)
    return -(-numel // piece) if piece else 1


def piece_numel_of(compressor: Compressor, numels: Sequence[int], piece_numel: int | None) -> int:
    """What `cut` gets for tensors of `numels` elements that are compressed together; 0: one piece.

    Args:
        piece_numel: the caller's choice, which does not count for a compressor that cannot be told where a
            piece starts, unless it previews; None: one piece.
    """
    divides = compressor.shard_unit is not None and compressor_at(compressor, 0) is not None
    counts = bool(numels) and (divides or previews(compressor))
    return piece_numel if piece_numel is not None and counts else 0


def cut(shard_numels: Sequence[int], unit: int, world_size: int, piece_numel: int) -> list[Piece]:
    """Cuts every tensor's shards, one tensor after the other, into pieces of about `piece_numel` elements.

    Args:
        shard_numels: elements of a shard of each tensor.
        unit: the compressor's chunk.
        piece_numel: elements of all ranks' shards together, rounded up to whole chunks of each, so that the
            last piece is no crumb. 0: one piece of everything.

    Returns:
        pieces that together have every element once, in order; none is empty. At least one.
    """
    most = -(-piece_numel // (world_size * unit)) * unit if piece_numel else sum(shard_numels)
    pieces: list[Piece] = [[]]
    room = most
    for tensor, numel in enumerate(shard_numels):
        start = 0
        while start < numel:
            if room < min(unit, numel - start):
                pieces.append([])
                room = most
            # A vector's last chunk may be short; what is left of the room behind it holds whole chunks only.
            take = numel - start if numel - start <= room else room // unit * unit
            pieces[-1].append(Slice(tensor, start, take))
            start, room = start + take, room - take
    return pieces


class Decoding:
    """The last step of a reduction in pieces: what was gathered is decoded to the results.

    Where results are gradients that an error must leave as they were, the last piece is left to `finish`,
    when nothing else can fail any more. Those before it are decoded while others are on the wire, and the
    gradient is kept before it is written to: there is time for that.

    Args:
        decode: decodes a piece.
        places: of a piece, (i, start, stop) of what `decode` writes of result i.
        keep: of each result, called with (start, stop) before elements that may have to be put back change.
            None: results are nobody's, all is decoded as it comes.
    """

    def __init__(
        self,
        decode: Callable[[Piece, Tensor], None],
        places: Callable[[Piece], Iterable[tuple[int, int, int]]],
        results: Sequence[Tensor],
        keep: Keep | None,
    ) -> None:
        self._decode, self._places, self._results, self._keep = decode, places, results, keep
        self._left: tuple[Piece, Tensor] | None = None

    def __call__(self, piece: Piece, gathered: Tensor, last: bool) -> None:
        """A piece has come; `last`: no other will."""
        if self._keep is not None and last:
            self._left = piece, gathered
            return
        if self._keep is not None:
            for i, start, stop in self._places(piece):
                self._keep[i](start, stop)
        self._decode(piece, gathered)

    def finish(self) -> None:
        """Decodes what is left; may be called again."""
        if self._left is not None:
            self._decode(*self._left)
        torch.autograd.graph.increment_version(self._results)


def pipelined(
    transport: Transport,
    pieces: Sequence[Piece],
    start: Callable[[Piece], Started],
    reduce: Callable[[Piece, Tensor], Tensor],
    decoding: Decoding,
) -> None:
    """Runs every piece through both phases; the same operations in the same order on all ranks.

    From the point of view of one rank, of up to `UNDER_WAY` pieces at a time:
        1. Compress piece after piece and start its all-to-all.
        2. For every piece: wait for its all-to-all, reduce what came and start its all-gather.
        3. For every piece: wait for its all-gather and decode it.

    After an error nothing is under way, or the group is given up.

    Args:
        start: compresses a piece and starts its all-to-all.
        reduce: the body of the sum of what an all-to-all returned.
        decoding: takes what all-gathers returned.
    """
    swaps: deque[Started] = deque()
    gathers: deque[Started] = deque()
    try:
        for some, more in _batches(pieces):
            for piece in some:
                swaps.append(start(piece))
            for piece in some:
                reduced = reduce(piece, swaps.popleft().wait())
                gathers.append(start_all_gather(transport, reduced))
            _decode(some, gathers, more, decoding)
    except BaseException as error:
        _settle(transport, [*swaps, *gathers], error)
        raise


def in_one_call(
    transport: Transport,
    pieces: Sequence[Piece],
    compress: Callable[[Piece], Tensor],
    reduce: Callable[[Piece, Tensor], Tensor],
    decoding: Decoding,
) -> bool:
    """`pipelined` where the transport takes both phases of a piece at once, in the order of its stream.

    Args:
        compress: makes a piece's message, with a row for each owner.

    Returns:
        whether it does; else nothing has happened.
    """
    exchange = getattr(transport, "reduce_bytes", None)
    if exchange is None:
        return False
    for number, piece in enumerate(pieces, 1):
        rows = exchange(compress(piece), partial(reduce, piece))
        decoding(piece, rows, last=number == len(pieces))
    return True


def gathered(
    transport: Transport,
    pieces: Sequence[Piece],
    compress: Callable[[Piece], Tensor],
    catch_up: Callable[[Started], None],
    decoding: Decoding,
    nbytes: Callable[[Piece], int] | None = None,
) -> None:
    """Runs every piece through one phase, likewise: compress and gather, then decode.

    Args:
        compress: makes a piece's message.
        catch_up: does what `compress` has left for when the message is under way, if anything.
        decoding: takes what all-gathers returned.
        nbytes: of a piece's message, which peers may send as soon as they have it. None: they may wait until
            this rank has its own.
    """
    gathers: deque[Started] = deque()
    expected: deque[Callable[[Tensor], Started]] = deque()
    try:
        for some, more in _batches(pieces):
            if nbytes is not None:
                expected.extend(expect_all_gathers(transport, [nbytes(piece) for piece in some]))
            for piece in some:
                if len(gathers) == 1:
                    await_peers(gathers[0])
                body = compress(piece)
                gathers.append(expected.popleft()(body) if expected else start_all_gather(transport, body))
                catch_up(gathers[-1])
            _decode(some, gathers, more, decoding)
    except BaseException as error:
        _settle(transport, gathers, error, awaited=bool(expected))
        raise


def _batches(pieces: Sequence[Piece]) -> Iterator[tuple[Sequence[Piece], bool]]:
    """Pieces that are under way together, and whether there are more after them."""
    for first in range(0, len(pieces), UNDER_WAY):
        yield pieces[first : first + UNDER_WAY], first + UNDER_WAY < len(pieces)


def _decode(pieces: Sequence[Piece], gathers: deque[Started], more: bool, decoding: Decoding) -> None:
    for piece in pieces:
        decoding(piece, gathers.popleft().wait(), last=not gathers and not more)


def _settle(
    transport: Transport, started: Sequence[Started], error: BaseException, awaited: bool = False
) -> None:
    """After an error: gives the group up, or, where it stays in use, waits for what nobody wants any more.

    Args:
        awaited: whether messages were asked for that this rank has not begun to answer: they would be taken
            for those of the next call.
    """
    give_up(transport, "a piece", error)
    alone = transport.world_size == 1 and isinstance(error, Exception)
    if not (alone or on_all_ranks(error)):
        return
    try:
        for operation in started:
            operation.wait()
    except BaseException as another:
        transport.abort(f"{type(another).__name__} after {type(error).__name__} between pieces")
        if not isinstance(another, Exception):
            raise
    if awaited:
        transport.abort(f"{type(error).__name__} between pieces")
