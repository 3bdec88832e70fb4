"""Server residuals that the next call has no use for are sent by their owners, as workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import PeerLostError, StateMismatchError
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.collectives.grid import gradient, on_grid

N, UNIT = 1001, 32

AFTER = [
    (gck.TopK(ratio=0.1), "one_phase"),
    (gck.Sign(UNIT), "one_phase"),
    (gck.Quantize(bits=8, chunk_size=64), "one_phase"),
    (gck.RandomK(ratio=0.2, seed=1), "seeded"),
    (gck.LowRank(rank=2), "factored"),
    (gck.Quantize(bits=4, chunk_size=64), "two_phase"),
]


def used(group: Any, rank: int, op: str) -> gck.ErrorFeedback:
    """The residuals after three steps in two phases; the last owners of a large world have none."""
    state = gck.ErrorFeedback()
    for step in range(3):
        gck.all_reduce_(gradient(rank, step, N), state, gck.Sign(UNIT), group, op, algorithm="two_phase")
    assert state.server is not None
    assert bool(state.server.any()) == (rank * state.server.numel() < N)
    return state


def folded(state: gck.ErrorFeedback, divisor: int) -> gck.ErrorFeedback:
    """What the state should be taken for: by the numbers that it is saved with."""
    saved, own = state.state_dict(), gck.ErrorFeedback()
    own.worker, own.shard = saved["worker"].clone(), state.shard
    chunks = -(-own.worker.numel() // saved["unit"])
    start = saved["rank"] * (-(-chunks // saved["world_size"]) * saved["unit"])
    for i, left in enumerate(saved["server"]):
        if start + i < own.worker.numel():
            own.worker[start + i] += divisor * left
    return own


def contents(state: gck.ErrorFeedback) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in (state.worker, state.server)]


def check(group: Any, rank: int, compressor: Any, algorithm: str, op: str) -> None:
    state = used(group, rank, op)
    expected = folded(state, group.world_size if op == "avg" else 1)
    grad = gradient(rank, 3, N)
    result = gck.all_reduce_(grad.clone(), state, compressor, group, op, algorithm=algorithm)
    assert same_bytes(result, gck.all_reduce_(grad, expected, compressor, group, op, algorithm=algorithm))
    assert (state.server is None) == (algorithm != "two_phase")
    assert state.binding == expected.binding
    for got, wanted in zip(contents(state), contents(expected), strict=True):
        assert (got is None and wanted is None) or (
            got is not None and wanted is not None and same_bytes(got, wanted)
        )


@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize(("compressor", "algorithm"), AFTER, ids=str)
def test_another_algorithm_goes_on_with_what_owners_had(compressor: Any, algorithm: str, op: str) -> None:
    for world_size in (1, 3, 40):  # 40: owners of nothing
        SimulatedGroup(world_size).run(lambda member: check(member, member.rank, compressor, algorithm, op))


@pytest.mark.parametrize("compressor", [gck.Sign(UNIT), gck.ChunkTopK(4, UNIT)], ids=str)
def test_across_nodes(compressor: Any) -> None:
    """Chunks of one size, for these are what the ranks of a node share a tensor by."""
    on_grid((2, 3), lambda group: check(group, group.rank, compressor, "one_phase", "avg"))


def test_nothing_is_lost_from_algorithm_to_algorithm() -> None:
    """All that was ever put in comes out: top-k of everything sends the rest."""
    ways: list[tuple[Any, str]] = [(gck.Sign(UNIT), "two_phase"), *AFTER, (gck.TopK(ratio=1.0), "one_phase")]

    def train(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        state, given, got = gck.ErrorFeedback(), torch.zeros(N), torch.zeros(N)
        for step, (compressor, algorithm) in enumerate(ways):
            grad = gradient(member.rank, step, N)
            given += grad
            got += gck.all_reduce_(grad, state, compressor, member, algorithm=algorithm)
        assert state.worker is not None
        assert not state.worker.any()
        assert state.server is None
        return given, got

    found = SimulatedGroup(3).run(train)
    mean = torch.stack([given for given, _ in found]).mean(0)
    for _, got in found:
        # A few hundred roundings of numbers below 16, and tens of units would be missing.
        torch.testing.assert_close(got, mean, rtol=0, atol=2e-4)


@pytest.mark.parametrize("algorithm", ["two_phase", "one_phase", "dense"])
@pytest.mark.parametrize("first", ["avg", "sum"])
def test_sums_after_means_and_means_after_sums(first: str, algorithm: str) -> None:
    """A server residual is in units of the results that it was left of."""
    other = "sum" if first == "avg" else "avg"

    def train(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        state, given, got = used(member, member.rank, first), torch.zeros(N), torch.zeros(N)
        assert state.worker is not None
        assert state.server is not None
        owned = state.server if first == "avg" else state.server / 3
        given += state.worker
        given[member.rank * len(owned) :][: len(owned)] += 3 * owned[: max(0, N - member.rank * len(owned))]
        for op in (other, first, other):
            grad = gradient(member.rank, len(op), N)
            given += grad
            result = gck.all_reduce_(grad, state, gck.Sign(UNIT), member, op, algorithm=algorithm)
            got += result if op == "avg" else result / 3
        got += gck.all_reduce_(torch.zeros(N), state, gck.TopK(ratio=1.0), member, algorithm="one_phase")
        return given, got

    found = SimulatedGroup(3).run(train)
    mean = torch.stack([given for given, _ in found]).mean(0)
    for _, got in found:
        torch.testing.assert_close(got, mean, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("compressor", "algorithm", "op"),
    [(gck.TopK(ratio=0.1), "one_phase", "avg"), (gck.Sign(UNIT), "two_phase", "sum")],
)
def test_an_error_leaves_both_residuals_in_their_buffers(compressor: Any, algorithm: str, op: str) -> None:
    def train(member: SimulatedMember) -> None:
        state, grad = used(member, member.rank, "avg"), gradient(member.rank, 3, N)
        before, buffers, binding = contents(state), (state.worker, state.server), state.binding
        assert state.divisor == 3
        fails = Fragile(compressor, 1 if member.rank == 1 else 0)
        with pytest.raises((MemoryError, PeerLostError)):
            gck.all_reduce_(grad, state, fails, member, op, algorithm=algorithm)
        assert same_bytes(grad, gradient(member.rank, 3, N))
        assert state.worker is buffers[0]
        assert state.server is buffers[1]
        assert (state.binding, state.divisor) == (binding, 3)
        assert all(same_bytes(b, a) for b, a in zip(before, contents(state), strict=True) if b is not None)

    SimulatedGroup(3, timeout=20).run(train)


@pytest.mark.parametrize("algorithm", ["one_phase", "dense"])
def test_residuals_of_another_rank_are_refused(algorithm: str) -> None:
    """They would be sent twice."""
    states = SimulatedGroup(3).run(lambda member: used(member, member.rank, "avg"))

    def train(member: SimulatedMember) -> None:
        state = states[(member.rank + 1) % 3]
        before = contents(state)
        with pytest.raises(StateMismatchError, match="server residual: belongs to"):
            gck.all_reduce_(gradient(member.rank, 3, N), state, gck.Sign(UNIT), member, algorithm=algorithm)
        assert all(same_bytes(b, a) for b, a in zip(before, contents(state), strict=True) if b is not None)

    SimulatedGroup(3).run(train)


def test_chunks_of_another_size_are_sent_dense() -> None:
    def train(member: SimulatedMember) -> None:
        state = used(member, member.rank, "avg")
        expected = folded(state, 3)
        assert expected.worker is not None
        acc = gradient(member.rank, 3, N) + expected.worker
        result = gck.all_reduce_(gradient(member.rank, 3, N), state, gck.Sign(64), member, algorithm="dense")
        accs = [row.view(torch.float32) for row in member.all_gather_bytes(acc.view(torch.uint8))]
        torch.testing.assert_close(result, torch.stack(accs).mean(0), rtol=0, atol=1e-5)

    SimulatedGroup(3).run(train)
