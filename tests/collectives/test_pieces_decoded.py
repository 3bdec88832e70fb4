"""Pieces that are decoded to the gradient while others are on the wire: a failure puts them back."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.collectives.pieces import UNDER_WAY, Decoding, Slice
from gck.collectives.transports import Started
from gck.error_feedback import ErrorFeedback
from gck.errors import CorruptPayloadError, GroupUnusableError, PeerLostError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.sign import Sign
from tests.collectives.scenarios import digest, gradient

PIECES, N, WORLD_SIZE = 4, 512, 3
ALGORITHMS = ["one_phase", "two_phase"]


class Fated:
    """A member whose last gather goes to `fate`."""

    def __init__(self, member: SimulatedMember, fate: Any) -> None:
        self._member, self._fate, self._left = member, fate, PIECES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        started, fated = self._member.start_all_gather_bytes(send), self

        class Gather:
            def wait(self) -> Tensor:
                rows = started.wait()
                fated._left -= 1
                return rows if fated._left else fated._fate(rows)

        return Gather()


def used(member: SimulatedMember, compressor: Any, algorithm: str) -> ErrorFeedback:
    state = ErrorFeedback()
    all_reduce_(gradient(member.rank, N, step=1), state, compressor, member, algorithm=algorithm)
    return state


def kept(state: ErrorFeedback) -> list[str]:
    return digest(state.worker, state.server, state.nonfinite)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("error", [PeerLostError("gone"), KeyboardInterrupt()], ids=repr)
def test_the_last_gather_fails(error: BaseException, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the other pieces are in the gradient."""
    early: list[bool] = []
    call = Decoding.__call__

    def watched(self: Decoding, *given: Any, **options: Any) -> None:
        call(self, *given, **options)
        early.append(self._left is None)

    monkeypatch.setattr(Decoding, "__call__", watched)

    def fate(rows: Tensor) -> Tensor:
        raise error

    def rank_main(member: SimulatedMember) -> None:
        grad, state = gradient(member.rank, N), used(member, Sign(32), algorithm)
        early.clear()
        before, copy = kept(state), grad.clone()
        with pytest.raises(type(error)):
            all_reduce_(
                grad, state, Sign(32), Fated(member, fate), algorithm=algorithm, piece_numel=N // PIECES
            )
        assert early == [True] * (PIECES - 1)
        assert torch.equal(grad, copy)
        assert kept(state) == before
        if not isinstance(error, Exception):
            with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
                member.barrier()

    SimulatedGroup(1, timeout=20).run(rank_main)


class Exhausted(Sign):
    """Runs out of memory in its `left`-th decode of rank 0."""

    left: ClassVar[int] = 0

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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("at", range(1, PIECES))
def test_decoding_fails(at: int, algorithm: str) -> None:
    """All is as it was where it fails, and nobody goes on as if nothing had been."""
    Exhausted.left = 0

    def rank_main(member: SimulatedMember) -> str:
        mine = Exhausted(32) if member.rank == 0 else Sign(32)
        grad, state = gradient(member.rank, N), used(member, Sign(32), algorithm)
        before, copy = kept(state), grad.clone()
        member.barrier()
        if member.rank == 0:
            # A piece is decoded in one call, or in one for each owner.
            Exhausted.left = at if algorithm == "one_phase" else 2 * at
        options: dict[str, Any] = {"algorithm": algorithm, "piece_numel": N // PIECES, "validate": "off"}
        try:
            all_reduce_(grad, state, mine, member, **options)
        except (MemoryError, PeerLostError, GroupUnusableError) as error:
            assert torch.equal(grad, copy)
            assert kept(state) == before
            return type(error).__name__
        finally:
            with pytest.raises((PeerLostError, GroupUnusableError)):
                member.barrier()
        return "done"

    outcomes = SimulatedGroup(2, timeout=20).run(rank_main)
    assert outcomes[0] == "MemoryError"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_corrupt_last_piece(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one phase it is found as the last piece is decoded: the others are not left in the gradient."""
    compressor = ChunkTopK(k=4, chunk_size=32, value_bits=32)
    finish, calls = Decoding.finish, [0]

    def finish_later(self: Decoding) -> None:
        calls[0] += 1
        if interrupted and calls[0] == 1:
            raise KeyboardInterrupt
        finish(self)

    def spoil(rows: Tensor) -> Tensor:
        return torch.full_like(rows, 0xFF)  # indices beyond the chunk

    def rank_main(member: SimulatedMember) -> None:
        grad, state = gradient(member.rank, N), used(member, compressor, "one_phase")
        monkeypatch.setattr(Decoding, "finish", finish_later)
        before, copy = kept(state), grad.clone()
        options: dict[str, Any] = {"algorithm": "one_phase", "piece_numel": N // PIECES}
        with pytest.raises(KeyboardInterrupt if interrupted else CorruptPayloadError):
            all_reduce_(grad, state, compressor, Fated(member, spoil), **options)
        assert calls == [1 + interrupted]
        assert torch.equal(grad, copy)
        assert kept(state) == before

    SimulatedGroup(1, timeout=20).run(rank_main)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_pieces_than_may_be_under_way(algorithm: str) -> None:
    pieces = 40
    assert pieces > 2 * UNDER_WAY

    def rank_main(member: SimulatedMember, piece_numel: int) -> list[str]:
        grad, state = gradient(member.rank, 3 * 32 * pieces), ErrorFeedback()
        all_reduce_(grad, state, Sign(32), member, algorithm=algorithm, piece_numel=piece_numel)
        return digest(grad) + kept(state)

    found = [SimulatedGroup(WORLD_SIZE, timeout=30).run(rank_main, numel) for numel in (0, 3 * 32)]
    assert found[0] == found[1]


def test_the_last_piece_is_left_to_the_end() -> None:
    log: list[Any] = []
    results, rows = [torch.zeros(4)], torch.zeros(1)
    decoding = Decoding(
        lambda piece, rows: log.append(piece[0].start),
        lambda piece: [(0, piece[0].start, piece[0].start + 1)],
        results,
        [lambda start, stop: log.append((start, stop))],
    )
    decoding([Slice(0, 0, 1)], rows, last=False)
    decoding([Slice(0, 1, 1)], rows, last=False)
    decoding([Slice(0, 2, 1)], rows, last=True)
    assert log == [(0, 1), 0, (1, 2), 1]
    version = results[0]._version
    for _ in range(2):  # Ctrl-C: once more
        decoding.finish()
    assert log == [(0, 1), 0, (1, 2), 1, 2, 2]
    assert results[0]._version > version
