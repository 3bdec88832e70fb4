"""Pieces that are decoded to the gradient while others are on the wire: a failure puts them back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.collectives.pieces import UNDER_WAY, Decoding, Slice
from gck.collectives.transports import Done, Started
from gck.error_feedback import ErrorFeedback
from gck.errors import CorruptPayloadError, GroupUnusableError, PeerLostError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.sign import Sign
from tests.collectives.scenarios import digest, gradient

PIECES, N, WORLD_SIZE = 4, 384, 3
ALGORITHMS = ["one_phase", "two_phase"]


class Slow:
    """A member whose gathers are under way until somebody waits for them; the last one's go to `fate`."""

    def __init__(self, member: SimulatedMember, fate: Any = None) -> None:
        self._member, self._fate, self._left = member, fate, PIECES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        started, slow = self._member.start_all_gather_bytes(send), self

        class Gather:
            def is_completed(self) -> bool:
                return False

            def wait(self) -> Tensor:
                rows = started.wait()
                slow._left -= 1
                return rows if slow._left or slow._fate is None else slow._fate(rows)

        return Gather()


def used(member: SimulatedMember, compressor: Any, algorithm: str) -> ErrorFeedback:
    state = ErrorFeedback()
    all_reduce_(gradient(member.rank, N, step=1), state, compressor, member, algorithm=algorithm)
    return state


def kept(state: ErrorFeedback) -> list[str]:
    return digest(state.worker, state.server, state.nonfinite)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("compressor", [Sign(32), ChunkTopK(k=6, chunk_size=32)], ids=str)
def test_same_bits(compressor: Any, algorithm: str) -> None:
    def rank_main(member: SimulatedMember, slow: bool) -> list[str]:
        grad, state = gradient(member.rank, N), used(member, compressor, algorithm)
        group = Slow(member) if slow else member
        all_reduce_(
            grad, state, compressor, group, algorithm=algorithm, piece_numel=N // PIECES if slow else 0
        )
        return digest(grad) + kept(state)

    found = [SimulatedGroup(WORLD_SIZE, timeout=30).run(rank_main, slow) for slow in (True, False)]
    assert found[0] == found[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("error", [PeerLostError("gone"), KeyboardInterrupt()], ids=repr)
def test_the_last_gather_fails(error: BaseException, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the other pieces are in the gradient."""
    early: list[bool] = []
    call = Decoding.__call__

    def watched(self: Decoding, *given: Any) -> None:
        call(self, *given)
        early.append(not self._left)

    monkeypatch.setattr(Decoding, "__call__", watched)

    def fate(rows: Tensor) -> Tensor:
        raise error

    def rank_main(member: SimulatedMember) -> None:
        grad, state = gradient(member.rank, N), used(member, Sign(32), algorithm)
        early.clear()
        before, copy = kept(state), grad.clone()
        with pytest.raises(type(error)):
            all_reduce_(
                grad, state, Sign(32), Slow(member, fate), algorithm=algorithm, piece_numel=N // PIECES
            )
        assert early == [True] * (PIECES - 1)
        assert torch.equal(grad, copy)
        assert kept(state) == before
        if not isinstance(error, Exception):
            with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
                member.barrier()

    SimulatedGroup(1, timeout=20).run(rank_main)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_decoding_fails_early(algorithm: str) -> None:
    """Of want of memory, half-way through a piece: of Sign a piece is decoded in one call or one a rank."""

    class Exhausted(Sign):
        left = 0

        def _count(self) -> None:
            type(self).left -= 1
            if type(self).left == 0:
                raise MemoryError

        def decompress(self, *args: Any, **options: Any) -> None:
            super().decompress(*args, **options)
            self._count()

        def decompress_mean_(self, *args: Any, **options: Any) -> None:
            super().decompress_mean_(*args, **options)
            self._count()

    def rank_main(member: SimulatedMember, at: int) -> str:
        grad, state = gradient(member.rank, N), used(member, Exhausted(32), algorithm)
        before, copy = kept(state), grad.clone()
        Exhausted.left = at
        try:
            options: dict[str, Any] = {"algorithm": algorithm, "piece_numel": N // PIECES}
            all_reduce_(grad, state, Exhausted(32), Slow(member), **options)
        except MemoryError:
            assert torch.equal(grad, copy)
            assert kept(state) == before
            return "failed"
        return "done"

    outcomes = [SimulatedGroup(1, timeout=20).run(rank_main, at)[0] for at in range(1, PIECES)]
    assert outcomes == ["failed"] * (PIECES - 1)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_corrupt_last_piece(waiting: bool) -> None:
    """In one phase it is found as the last piece is decoded: the others are not left in the gradient, nor in
    the memory that `finish` writes to."""
    compressor = ChunkTopK(k=4, chunk_size=32, value_bits=32)

    def spoil(rows: Tensor) -> Tensor:
        return torch.full_like(rows, 0xFF)  # indices beyond the chunk

    class Fast(Slow):
        def start_all_gather_bytes(self, send: Tensor) -> Started:
            return Done(super().start_all_gather_bytes(send).wait())

    def rank_main(member: SimulatedMember) -> None:
        grad, state = gradient(member.rank, N), used(member, compressor, "one_phase")
        before, copy = kept(state), grad.clone()
        group = (Slow if waiting else Fast)(member, spoil)
        with pytest.raises(CorruptPayloadError):
            all_reduce_(grad, state, compressor, group, algorithm="one_phase", piece_numel=N // PIECES)
        assert torch.equal(grad, copy)
        assert kept(state) == before

    SimulatedGroup(1, timeout=20).run(rank_main)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_pieces_than_may_be_under_way(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; of each batch but the last one, the last piece is decoded before the next batch."""
    left: list[int] = []
    finish = Decoding.finish
    monkeypatch.setattr(Decoding, "finish", lambda self: [left.append(len(self._left)), finish(self)][1])

    def rank_main(member: SimulatedMember, piece_numel: int) -> list[str]:
        grad, state = gradient(member.rank, 3 * 32 * 40), ErrorFeedback()
        all_reduce_(grad, state, Sign(32), member, algorithm=algorithm, piece_numel=piece_numel)
        return digest(grad) + kept(state)

    pieces, batches = 40, 3
    assert batches == -(-pieces // UNDER_WAY)
    found = [SimulatedGroup(WORLD_SIZE, timeout=30).run(rank_main, numel) for numel in (0, 3 * 32)]
    assert found[0] == found[1]
    assert left[:WORLD_SIZE] == [1] * WORLD_SIZE
    assert left[WORLD_SIZE:] == [pieces - batches + 1] * WORLD_SIZE


def test_pieces_that_have_all_come_are_left_to_the_end() -> None:
    log: list[Any] = []
    results = [torch.zeros(4)]
    decoding = Decoding(
        lambda piece, rows: log.append(piece[0].start),
        lambda piece: [(0, piece[0].start, piece[0].start + 1)],
        results,
        [lambda start, stop: log.append((start, stop))],
    )

    rows = torch.zeros(1)
    decoding([Slice(0, 0, 1)], rows, last=False, waiting=True)
    decoding([Slice(0, 1, 1)], rows, last=False, waiting=False)
    decoding([Slice(0, 2, 1)], rows, last=True, waiting=False)
    assert log == [(0, 1), 0]
    version = results[0]._version
    for _ in range(2):  # Ctrl-C: once more
        decoding.finish()
    assert log == [(0, 1), 0, 1, 2, 1, 2]
    assert results[0]._version > version
