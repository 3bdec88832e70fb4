"""Pieces of a two-phase all-reduce: while one is on the wire, the next is compressed and the last decoded.

A piece takes the same elements of every rank's shard, so that who owns what does not depend on the pieces.
Source: the chunks of a pipelined reduction in Thakur, Rabenseifner and Gropp, "Optimization of Collective
Communication Operations in MPICH" (2005), section 4, over compressed messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from gck.collectives.transports import Started, Transport, start_all_gather
from gck.compressor import Compressor, compressor_at
from gck.errors import ArgumentError, CollectiveError, DtypeError

__all__ = ["Piece", "Slice", "check_piece_numel", "choose_piece_numel", "cut", "piece_numel_of", "pipelined"]


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


def check_piece_numel(function: str, piece_numel: object) -> None:
    """Raises unless `piece_numel` is None or a number of elements.

    Raises:
        DtypeError: it is neither None nor an int.
        ArgumentError: it is negative.
    """
    if piece_numel is None:
        return
    if isinstance(piece_numel, bool) or not isinstance(piece_numel, int):
        raise DtypeError(f"{function}: piece_numel must be an int or None, got {type(piece_numel).__name__}")
    if piece_numel < 0:
        raise ArgumentError(f"{function}: piece_numel must be at least 0, got {piece_numel}")


def choose_piece_numel(compressor: Compressor, numel: int, world_size: int, device_type: str = "cpu") -> int:
    """Elements a piece when `numel` elements go by two phases; 0: all at once. Of the arguments alone.

    It is 0: pieces pay on some links and cost on others, as docs/collectives.md measures, and which of them
    there are follows from no argument. Who knows the links says `piece_numel`.
    """
    return 0


def piece_numel_of(
    compressor: Compressor, numels: Sequence[int], world_size: int, device_type: str, piece_numel: int | None
) -> int:
    """What `cut` gets for tensors of `numels` elements that go by two phases together; 0: one piece.

    Args:
        piece_numel: the caller's choice; None: `choose_piece_numel`. Neither counts for a compressor that
            cannot be told where a piece starts.
    """
    if piece_numel is None:
        return choose_piece_numel(compressor, sum(numels), world_size, device_type)
    return piece_numel if numels and compressor_at(compressor, 0) is not None else 0


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


def pipelined(
    transport: Transport,
    pieces: Sequence[Piece],
    start: Callable[[Piece], Started],
    reduce: Callable[[Piece, Tensor], Tensor],
    decode: Callable[[Piece, Tensor], None],
) -> None:
    """Runs every piece through both phases; the same operations in the same order on all ranks.

    With P pieces, from the point of view of one rank:
        1. Compress piece 0 and start its all-to-all.
        2. For j = 0 to P - 1: compress piece j + 1 and start its all-to-all; wait for that of piece j, reduce
           what came and start its all-gather; wait for the all-gather of piece j - 1 and decode it.
        3. Wait for the last all-gather and decode it.

    At most two all-to-alls and two all-gathers are under way. After an error none is, or the group is given
    up.

    Args:
        start: compresses a piece and starts its all-to-all.
        reduce: the body of the sum of what an all-to-all returned.
        decode: takes what an all-gather returned.
    """
    swaps: deque[Started] = deque()
    gathers: deque[Started] = deque()
    try:
        swaps.append(start(pieces[0]))
        for j, piece in enumerate(pieces):
            if j + 1 < len(pieces):
                swaps.append(start(pieces[j + 1]))
            reduced = reduce(piece, swaps.popleft().wait())
            gathers.append(start_all_gather(transport, reduced))
            if j:
                decode(pieces[j - 1], gathers.popleft().wait())
        decode(pieces[-1], gathers.popleft().wait())
    except BaseException as error:
        _settle(transport, [*swaps, *gathers], error)
        raise


def _settle(transport: Transport, started: Sequence[Started], error: BaseException) -> None:
    """Waits for operations that nobody wants any more; where that is no use, gives the group up."""
    interrupted = not isinstance(error, Exception)  # perhaps between a start and the list of what was started
    if interrupted or (started and isinstance(error, CollectiveError)):
        # The group failed, or somebody pressed Ctrl-C: whatever is under way may never end.
        transport.abort(f"{type(error).__name__} between pieces")
        return
    try:
        for operation in started:
            operation.wait()
    except BaseException as another:
        transport.abort(f"{type(another).__name__} after {type(error).__name__} between pieces")
        if not isinstance(another, Exception):
            raise
