"""Residuals of W ranks become those of W' ranks: what they still owe the result is the same.

Shown by the collective itself: a dense all-reduce of zeros returns what all residuals add to the result,
and leaves none.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.checkpoint.file import Header, StateFile, write
from gck.checkpoint.reshard import _overlaps, resharded
from gck.checkpoint.sets import path_of
from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.errors import StateMismatchError
from tests.cases import same_bytes

U = 2.0**-24  # the relative error of one rounding to fp32
NUMELS = {"a": 1000, "b": 33, "tiny": 1, "empty": 0}
SIGN = gck.Sign(chunk_size=32)
TOPK = gck.TopK(ratio=0.1)
States = list[gck.ErrorFeedbackMap]


def trained(world_size: int, compressor: Any, op: str) -> States:
    """What three steps of the real collective leave, of gradients with large and small entries."""
    states = [gck.ErrorFeedbackMap() for _ in range(world_size)]

    def train(member: SimulatedMember) -> None:
        generator = torch.Generator().manual_seed(member.rank)
        for _ in range(3):
            for name, numel in NUMELS.items():
                grad = torch.randn(numel, generator=generator).pow_(3)
                all_reduce_(grad, states[member.rank][name], compressor, member, op, algorithm(compressor))

    SimulatedGroup(world_size).run(train)
    return states


def algorithm(compressor: Any) -> str:
    return "one_phase" if compressor.shard_unit is None else "two_phase"


def saved(directory: Path, states: States, compressor: Any, step: int = 1) -> Path:
    for rank, state in enumerate(states):
        gck.save_state(
            directory, state, rank=rank, world_size=len(states), step=step, compressor=compressor, keep=9
        )
    return directory


def loaded(directory: Path, world_size: int, compressor: Any, **options: Any) -> States:
    states = [gck.ErrorFeedbackMap() for _ in range(world_size)]
    for rank, state in enumerate(states):
        options = {"numels": NUMELS, "reshard": True, "compressor": compressor} | options
        gck.load_state(directory, state, rank=rank, world_size=world_size, **options)
    return states


def flushed(states: States, compressor: Any, op: str) -> dict[str, Tensor]:
    """What the residuals add to the result, by the collective; it empties them."""

    def flush(member: SimulatedMember) -> dict[str, Tensor]:
        state = states[member.rank]
        return {
            name: all_reduce_(torch.zeros(numel), state[name], compressor, member, op, "dense")
            for name, numel in NUMELS.items()
        }

    return SimulatedGroup(len(states)).run(flush)[0]


def owed(states: States, name: str, op: str) -> tuple[Tensor, Tensor]:
    """The same by the formula, in fp64; and the sum of the magnitudes in it."""
    numel, world_size = NUMELS[name], len(states)
    factor = 1 / world_size if op == "avg" else 1.0
    total, size = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for rank, residuals in enumerate(states):
        state = residuals[name]
        if state.worker is not None:
            total += factor * state.worker.double()
            size += factor * state.worker.double().abs()
        if state.server is not None:
            shard = state.server.numel()
            part = state.server[: max(0, numel - rank * shard)].double()
            total[rank * shard :][: part.numel()] += part
            size[rank * shard :][: part.numel()] += part.abs()
    return total, size


@pytest.mark.parametrize("server", ["keep", "fold"])
@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("compressor", [SIGN, TOPK], ids=["sign", "topk"])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 5), (1, 3), (3, 1)])
def test_what_residuals_owe_is_the_same(
    before: int, after: int, compressor: Any, op: str, server: str, tmp_path: Path
) -> None:
    """Each new worker entry is rounded once, by at most U of it; what comes before that is in fp64, as the
    sums of this test are, with at most before + after + 8 roundings of 2^-53 of all that is added.

    The collective adds W residuals, and the server's times W, divides, and rounds each time: at most W + 3
    roundings of U of all that is added.
    """
    old = trained(before, compressor, op)
    new = loaded(saved(tmp_path, old, compressor), after, compressor, op=op, server=server)
    owes = {name: (owed(old, name, op), owed(new, name, op)) for name in NUMELS}
    for name, ((was, size), (now, new_size)) in owes.items():
        slack = U * new_size + (before + after + 8) * 2.0**-53 * (size + new_size)
        assert bool(((now - was).abs() <= slack).all()), name
    was, size = owes["a"][0]
    assert float(was.abs().max()) > 0.1  # or nothing was at stake
    assert float(U * size.max()) < 1e-5
    flushes = flushed(old, compressor, op), flushed(new, compressor, op)
    for name, ((_, size), (_, new_size)) in owes.items():
        slack = U * new_size + 1.01 * U * ((before + 3) * size + (after + 3) * new_size)
        assert bool(((flushes[0][name].double() - flushes[1][name].double()).abs() <= slack).all()), name
    assert all(owed(states, "a", op)[1].max() == 0 for states in (old, new))


@pytest.mark.parametrize("op", ["avg", "sum"])
def test_the_same_world_is_bit_exact(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the way that other worlds take."""
    states = trained(3, SIGN, op)
    first = states[0]["a"].worker
    assert first is not None
    first[0] = -0.0
    saved(tmp_path, states, SIGN)
    by_resharding = [
        {
            name: resharded(
                [StateFile(path_of(tmp_path, 1, r, 3)) for r in range(3)], name, rank, 3, op, "keep"
            )
            for name in NUMELS
        }
        for rank in range(3)
    ]
    for rank, state in enumerate(loaded(tmp_path, 3, SIGN, op=op, reshard=False)):
        for name in NUMELS:
            for kind in ("worker", "server"):
                mine = getattr(states[rank][name], kind)
                assert same_bytes(getattr(state[name], kind), mine)
                assert same_bytes(by_resharding[rank][name][kind], mine)
            assert state[name].binding == states[rank][name].binding


def test_there_and_back(tmp_path: Path) -> None:
    """From 2 ranks to 4 each residual is taken twice, and back, each pair is averaged: bit for bit."""
    states = trained(2, SIGN, "avg")
    wide = loaded(saved(tmp_path / "2", states, SIGN), 4, SIGN)
    back = loaded(saved(tmp_path / "4", wide, SIGN), 2, SIGN)
    for rank in (0, 1):
        for name in NUMELS:
            for kind in ("worker", "server"):
                assert same_bytes(getattr(back[rank][name], kind), getattr(states[rank][name], kind))
    assert same_bytes(wide[2]["a"].worker, states[1]["a"].worker)
    assert same_bytes(wide[3]["a"].worker, states[1]["a"].worker)


def test_residuals_do_not_grow(tmp_path: Path) -> None:
    """Each is a mean of some: a fraction of the old largest would stay small when W' is large."""
    states = trained(3, TOPK, "avg")
    largest = max(float(state["a"].worker.abs().max()) for state in states if state["a"].worker is not None)
    for world_size in (1, 2, 7):
        for state in loaded(saved(tmp_path, states, TOPK), world_size, TOPK, read_only=True):
            assert state["a"].worker is not None
            assert float(state["a"].worker.abs().max()) <= largest


@pytest.mark.parametrize(("saved_by", "world_size"), [(4, 2), (2, 4), (3, 5), (7, 3), (1, 6), (6, 1), (1, 1)])
def test_the_line_is_covered_once(saved_by: int, world_size: int) -> None:
    covered = [0] * saved_by
    for rank in range(world_size):
        parts = list(_overlaps(saved_by, world_size, rank))
        assert sum(part for _, part in parts) == saved_by
        assert all(part > 0 for _, part in parts)
        for old, part in parts:
            covered[old] += part
    assert covered == [world_size] * saved_by


def test_counters_are_kept_once(tmp_path: Path) -> None:
    states = trained(3, TOPK, "avg")
    for rank, state in enumerate(states):
        state["a"].nonfinite_for(torch.device("cpu")).fill_(10**rank)
    saved(tmp_path, states, TOPK)
    for world_size in (1, 2, 3, 5):
        new = loaded(tmp_path, world_size, TOPK, read_only=True)
        assert sum(int(state["a"].state_dict().get("nonfinite", 0)) for state in new) == 111


def test_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of ranks that do not contribute."""
    saved(tmp_path, trained(6, SIGN, "avg"), SIGN)
    read: list[weakref.ref[Tensor]] = []
    asked: set[tuple[int, str]] = set()
    tensor = StateFile.tensor

    def counted(file: StateFile, name: str, kind: str) -> Tensor:
        # The one before may still have its name in a loop.
        assert sum(reference() is not None for reference in read) <= 1
        asked.add((file.header.rank, kind))
        result = tensor(file, name, kind)
        read.append(weakref.ref(result))
        return result

    monkeypatch.setattr(StateFile, "tensor", counted)
    state = gck.ErrorFeedbackMap()
    gck.load_state(tmp_path, state, rank=1, world_size=3, compressor=SIGN, reshard=True, read_only=True)
    assert len(state) == len(NUMELS)
    assert {rank for rank, kind in asked if kind == "worker"} == {2, 3}
    assert {rank for rank, kind in asked if kind == "server"} < set(range(6))


def test_training_goes_on(tmp_path: Path) -> None:
    """Four ranks, then three, by the collective of each; another compressor after a fold."""
    saved(tmp_path, trained(4, SIGN, "avg"), SIGN)
    for compressor, server in ((SIGN, "keep"), (gck.Sign(64), "fold"), (TOPK, "fold"), (TOPK, "reset")):
        states = loaded(tmp_path, 3, compressor, server=server, read_only=True)

        def step(member: SimulatedMember, states: States = states, by: Any = compressor) -> Tensor:
            return all_reduce_(torch.ones(1000), states[member.rank]["a"], by, member, "avg", algorithm(by))

        results = SimulatedGroup(3).run(step)
        assert all(same_bytes(result, results[0]) for result in results)


def test_a_rank_that_lacks_a_tensor(tmp_path: Path) -> None:
    """One that has never used it has left nothing out."""
    states = [gck.ErrorFeedbackMap(), gck.ErrorFeedbackMap()]
    states[1]["a"].worker_for(torch.ones(1000)).fill_(3.0)
    (one,) = loaded(saved(tmp_path, states, TOPK), 1, TOPK)
    assert (one["a"].worker_for(torch.ones(1000)) == 1.5).all()


def test_ranks_that_contradict_each_other(tmp_path: Path) -> None:
    states = [gck.ErrorFeedbackMap(), gck.ErrorFeedbackMap()]
    states[0]["a"].worker_for(torch.ones(1000))
    states[1]["a"].worker_for(torch.ones(999))
    saved(tmp_path, states, TOPK)
    with pytest.raises(StateMismatchError, match="'a' has another numel on each rank: 999 on rank 1, 1000"):
        loaded(tmp_path, 1, TOPK)
    saved(tmp_path, states[:1] + states[:1], TOPK, step=2)
    gck.save_state(tmp_path, states[0], rank=1, world_size=2, step=2, compressor=SIGN)
    with pytest.raises(StateMismatchError, match=r"rank 0 saved with compressor .TopK\(.*rank 1 with .Sign"):
        loaded(tmp_path, 1, TOPK)


def test_residuals_of_a_part_of_the_ranks(tmp_path: Path) -> None:
    """What the fields of a later kind of residual mean nobody knows here: they come back, and no more."""
    path = path_of(tmp_path, 1, 0, 1)
    state = {"worker": torch.ones(3), "shard": {"numel": 6, "rank": 0}}
    write(path, Header(1, 0, 1, None, 1.0, True), {"": state})
    assert StateFile(path).state("")["shard"] == {"numel": 6, "rank": 0}
    with pytest.raises(StateMismatchError, match="residuals of '' on rank 0 are of another group"):
        gck.load_state(tmp_path, gck.ErrorFeedback(), rank=1, world_size=2, reshard=True)
