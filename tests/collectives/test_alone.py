"""An error that one rank has alone, anywhere in a collective: what it sends next is not taken for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, all_reduce_, all_reduce_many_, sparse_all_gather
from gck.errors import GroupUnusableError, PeerLostError
from tests.cases import same_bytes
from tests.collectives.scenarios import gradient

SENDING = {
    "all_gather_bytes",
    "all_to_all_bytes",
    "all_reduce",
    "start_all_gather_bytes",
    "start_all_to_all_bytes",
}


class Short:
    """A member whose n-th operation finds no memory, before anything is sent or once it has."""

    def __init__(self, member: Any, fail_at: int, late: bool) -> None:
        self._member, self._fail_at, self._late = member, fail_at, late
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._member, name)
        return self._short(real) if name in SENDING else real

    def with_timeout(self, seconds: float) -> Short:
        return self

    def _short(self, real: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def operation(send: Tensor) -> Any:
            self._fail_at -= 1
            if self._fail_at == 0 and not self._late:
                self.failed = True
                raise MemoryError("no room")
            result = real(send)
            if self._fail_at == 0:
                self.failed = True
                raise MemoryError("no room")
            return result

        return operation


def reduced(compressor: Any, **options: Any) -> Callable[[Any, gck.ErrorFeedback, int], Tensor]:
    def call(member: Any, state: gck.ErrorFeedback, step: int) -> Tensor:
        return all_reduce_(gradient(member.rank, 1000, step=step), state, compressor, member, **options)

    return call


def many(member: Any, state: gck.ErrorFeedback, step: int) -> Tensor:
    """Of two algorithms in turn."""
    grads = [gradient(member.rank, n, step=step) for n in (8, 3000)]
    all_reduce_many_(grads, [None, state], gck.TopK(k=8), member)
    return torch.cat(grads)


def payloads(member: Any, state: gck.ErrorFeedback, step: int) -> Tensor:
    found = sparse_all_gather(gck.topk(gradient(member.rank, 1000, step=step), k=16), member)
    return torch.cat([payload.values for payload in found])


CALLS: dict[str, Callable[[Any, gck.ErrorFeedback, int], Tensor]] = {
    "one phase": reduced(gck.TopK(ratio=0.05)),
    "one phase, pieces": reduced(gck.Sign(32), algorithm="one_phase", piece_numel=320),
    "two phases": reduced(gck.Sign(32), algorithm="two_phase"),
    "two phases, pieces": reduced(gck.Sign(32), algorithm="two_phase", piece_numel=320),
    "always": reduced(gck.Sign(32), algorithm="two_phase", validate="always"),
    "checksums": reduced(gck.Sign(32), algorithm="two_phase", checksum=True),
    "dense": reduced(gck.TopK(ratio=0.05), algorithm="dense"),
    "seeded": reduced(gck.RandomK(ratio=0.1, seed=0), algorithm="seeded"),
    "factored": reduced(gck.LowRank(rank=2), algorithm="factored"),
    "factored, checksums": reduced(gck.LowRank(rank=2), algorithm="factored", checksum=True),
    "two algorithms": many,
    "payloads": payloads,
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_who_fails_alone_and_calls_again(name: str, late: bool) -> None:
    call = CALLS[name]
    undisturbed = [gck.ErrorFeedback(), gck.ErrorFeedback()]
    wanted = SimulatedGroup(2).run(lambda m: [call(m, undisturbed[m.rank], step) for step in range(3)])
    reached = 0
    for fail_at in range(1, 40):
        states = [gck.ErrorFeedback(), gck.ErrorFeedback()]
        short: list[Short] = []

        def rank_main(
            member: Any,
            fail_at: int = fail_at,
            states: list[gck.ErrorFeedback] = states,
            short: list[Short] = short,
        ) -> None:
            state = states[member.rank]
            # Ranks agree on the configuration in the first call.
            assert same_bytes(call(member, state, 0), wanted[member.rank][0])
            worker = None if state.worker is None else state.worker.clone()
            if member.rank == 1:
                try:
                    # The first where rank 0 fails at its end.
                    assert same_bytes(call(member, state, 1), wanted[1][1])
                except (PeerLostError, GroupUnusableError):
                    return
                with pytest.raises((PeerLostError, GroupUnusableError)):
                    call(member, state, 2)
                return
            short.append(Short(member, fail_at, late))
            try:
                call(short[0], state, 1)
            except MemoryError:
                assert worker is None or (state.worker is not None and same_bytes(state.worker, worker))
            else:
                member.abort("there was no such operation")
            with pytest.raises(GroupUnusableError):
                call(member, state, 1)

        SimulatedGroup(2, timeout=20).run(rank_main)
        if not short[0].failed:
            break
        reached += 1
    assert 1 <= reached < 39


SILENT = [name for name in CALLS if name.startswith(("seeded", "factored"))]  # alone they send nothing


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SILENT])
def test_the_only_rank_may_call_again(name: str) -> None:
    """Nobody waits for it."""
    member, call = SimulatedGroup(1).members[0], CALLS[name]
    expected = call(SimulatedGroup(1).members[0], gck.ErrorFeedback(), 0)
    state = gck.ErrorFeedback()
    with pytest.raises(MemoryError):
        call(Short(member, 1, False), state, 0)
    assert same_bytes(call(member, state, 0), expected)
