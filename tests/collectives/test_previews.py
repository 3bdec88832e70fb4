"""One phase of a compressor that says what it will send before its residual is updated."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_, all_reduce_many_
from gck.collectives.transports import Started
from gck.error_feedback import ErrorFeedback
from gck.errors import GroupUnusableError, PeerLostError
from gck.kernels.topk import TopK
from tests.cases import same_bytes

N, WORLD_SIZE = 70_000, 3  # enough to be sampled
TOPK = TopK(ratio=0.01)


def gradient(rank: int, step: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(10 * step + rank))


class Watched:
    """A member that looks at residuals when a gather starts."""

    def __init__(self, member: SimulatedMember, look: Any) -> None:
        self._member, self._look = member, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        self._look()
        return self._member.start_all_gather_bytes(send)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece_numel", [0, N])
def test_same_bits_and_when(piece_numel: int, dtype: torch.dtype) -> None:
    def rank_main(member: SimulatedMember) -> None:
        state, plain = ErrorFeedback(), ErrorFeedback()
        changed: list[bool] = []
        for step in range(3):
            grad, other = gradient(member.rank, step).to(dtype), gradient(member.rank, step).to(dtype)
            before = torch.zeros(N) if state.worker is None else state.worker.clone()
            watched: Any = Watched(
                member, lambda before=before: changed.append(not same_bytes(state.worker, before))
            )
            all_reduce_(grad, state, TOPK, watched, piece_numel=piece_numel)
            all_reduce_(other, plain, TOPK, member)
            assert same_bytes(grad, other)
            assert same_bytes(state.worker, plain.worker)
        assert changed == [piece_numel == 0] * 3

    SimulatedGroup(WORLD_SIZE).run(rank_main)


def test_tensors_that_are_too_few_to_preview_share_the_message() -> None:
    def rank_main(member: SimulatedMember) -> None:
        sizes = N, 500, N
        states = [[ErrorFeedback() for _ in sizes] for _ in range(2)]
        results = []
        for given, piece_numel in zip(states, (0, 1), strict=True):
            grads = [gradient(member.rank, i, n) for i, n in enumerate(sizes)]
            all_reduce_many_(grads, given, TOPK, member, piece_numel=piece_numel)
            results.append(grads)
        assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))
        assert all(same_bytes(a.worker, b.worker) for a, b in zip(*states, strict=True))

    SimulatedGroup(WORLD_SIZE).run(rank_main)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_a_residual_that_cannot_be_updated_gives_the_group_up(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers have the message already."""
    compress, ranks = TopK.compress_, SimulatedGroup(WORLD_SIZE)
    grads = [gradient(rank) for rank in range(WORLD_SIZE)]

    def failing(self: TopK, grad: Tensor, *given: Any, **options: Any) -> None:
        compress(self, grad, *given, **options)
        if grad.data_ptr() == grads[1].data_ptr():
            raise error

    def rank_main(member: SimulatedMember) -> None:
        grad, state = grads[member.rank], ErrorFeedback()
        all_reduce_(gradient(member.rank, 1), state, TOPK, member)
        assert state.worker is not None
        before, copy = state.worker.clone(), grad.clone()
        member.barrier()
        monkeypatch.setattr(TopK, "compress_", failing)
        if member.rank != 1:
            with suppress(PeerLostError):  # or it has what it waited for
                all_reduce_(grad, state, TOPK, member, piece_numel=N)
        else:
            with pytest.raises(type(error)):
                all_reduce_(grad, state, TOPK, member, piece_numel=N)
            assert same_bytes(grad, copy)
            assert same_bytes(state.worker, before)
        with pytest.raises((GroupUnusableError, PeerLostError)):
            member.barrier()

    ranks.run(rank_main)
