"""Two tiers on simulated ranks: whatever goes wrong is a typed error, and everything as it was."""

from __future__ import annotations

import threading

import pytest
import torch

import gck
from gck import HierarchicalGroup
from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    all_reduce_,
    all_reduce_many_,
    packed_all_reduce_,
)
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveMismatchError,
    DtypeError,
    GroupUnusableError,
    PeerLostError,
)
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.collectives.grid import gradient, on_grid


@pytest.mark.parametrize("odd", range(4))
def test_a_mismatch_is_raised_everywhere_and_the_group_stays_usable(odd: int) -> None:
    def train(group: HierarchicalGroup) -> None:
        grad = torch.ones(500 + (group.rank == odd))
        with pytest.raises(CollectiveMismatchError, match=rf"rank {odd} differs from most ranks in numel"):
            all_reduce_(grad, ErrorFeedback(), gck.Sign(32), group)
        assert (grad == 1).all()
        all_reduce_(torch.ones(500), ErrorFeedback(), gck.Sign(32), group)

    on_grid((2, 2), train)


def test_topologies_that_are_none() -> None:
    def different(member: SimulatedMember) -> None:
        with pytest.raises(CollectiveMismatchError, match=r"local_world_size: \[1, 1, 2, 2\]"):
            HierarchicalGroup.from_group(member, local_world_size=1 + member.rank // 2)
        with pytest.raises(ArgumentError, match="must divide the world size, got 3 and 4; nodes of unequal"):
            HierarchicalGroup.from_group(member, local_world_size=3)
        HierarchicalGroup.from_group(member, local_world_size=2).barrier()

    SimulatedGroup(4, timeout=60).run(different)

    def uneven(member: SimulatedMember) -> None:
        """Nodes of two and three ranks."""
        node, place = divmod(member.rank, 2) if member.rank < 4 else (1, 2)
        local, cross = member.split(node), member.split(place)
        with pytest.raises(CollectiveMismatchError, match="not the rows and columns of one grid"):
            HierarchicalGroup(local, cross)
        local.barrier()

    SimulatedGroup(5, timeout=60).run(uneven)

    def crossed(member: SimulatedMember) -> None:
        """Even ones, but one pair of ranks has its columns exchanged."""
        local = member.split(member.rank // 2)
        cross = member.split((0, 1, 1, 0)[member.rank])
        with pytest.raises(CollectiveMismatchError, match="not the rows and columns of one grid"):
            HierarchicalGroup(local, cross)

    SimulatedGroup(4, timeout=60).run(crossed)


@pytest.mark.parametrize("fresh", [True, False])
def test_failure_at_every_kernel_call(fresh: bool) -> None:
    """On a rank, in its node and in its peers of the other node: typed errors, and everything as it was."""
    numels, compressor = (200, 70), gck.Sign(32)

    def train(group: HierarchicalGroup, fail_at: int) -> str:
        grads = [gradient(group.rank, 0, m) for m in numels]
        states = [ErrorFeedback() for _ in numels]
        if not fresh:
            all_reduce_many_([g.clone() for g in grads], states, compressor, group, algorithm="two_phase")
        copies, saved = [g.clone() for g in grads], [state.snapshot() for state in states]
        fragile = Fragile(compressor, fail_at if group.rank == 1 else 0)
        try:
            all_reduce_many_(grads, states, fragile, group, algorithm="two_phase")
        except (MemoryError, PeerLostError) as error:
            assert all(same_bytes(g, c) for g, c in zip(grads, copies, strict=True))
            for state, before in zip(states, saved, strict=True):
                assert (state.worker is None) == (before.worker is None) == fresh
                assert state.shard == before.shard
                for pair in (before.worker, before.server):
                    assert pair is None or torch.equal(*pair)
            if isinstance(error, PeerLostError):
                with pytest.raises(GroupUnusableError):
                    all_reduce_many_(grads, states, compressor, group)
            return type(error).__name__
        return "done"

    outcomes = []
    for fail_at in range(1, 99):
        outcome = on_grid((2, 2), lambda group, at=fail_at: train(group, at))  # type: ignore[misc]
        outcomes.append(outcome)
        if outcome == ["done"] * 4:
            break
        assert outcome[1] == "MemoryError"
        assert {outcome[0], outcome[2], outcome[3]} <= {"PeerLostError", "done"}
    # Of each tensor a message, two to decode, and the owner's; of both owners of the larger one, and of the
    # one owner of the smaller.
    assert len(outcomes) == 2 * 4 + 2 + 1 + 1
    assert outcomes[0] == ["PeerLostError", "MemoryError", "PeerLostError", "PeerLostError"]


@pytest.mark.parametrize("lost", range(4))
def test_a_rank_that_leaves_is_lost_to_both_tiers(lost: int) -> None:
    def train(group: HierarchicalGroup) -> str:
        state, grad = ErrorFeedback(), gradient(group.rank, 0, 300)
        all_reduce_(grad.clone(), state, gck.Sign(32), group, algorithm="two_phase")
        if group.rank == lost:
            return "left"
        assert state.worker is not None
        before, worker = grad.clone(), state.worker.clone()
        with pytest.raises(PeerLostError):
            all_reduce_(grad, state, gck.Sign(32), group, algorithm="two_phase")
        assert torch.equal(grad, before)
        assert torch.equal(state.worker, worker)
        return "knew"

    assert on_grid((2, 2), train).count("knew") == 3


def test_a_failure_in_one_tier_releases_who_waits_in_the_other() -> None:
    """Rank 1 waits for rank 3 across nodes, until it has had enough; rank 0, which waits for rank 1 in their
    node and would wait much longer, learns of it."""
    release = threading.Event()

    def train(group: HierarchicalGroup) -> str:
        if group.rank >= 2:
            release.wait(60)  # nobody is released by the end of another's call
            return "waited"
        grad, state = torch.ones(300), ErrorFeedback()
        try:
            if group.rank == 1:
                group.with_timeout(0.5).all_gather_bytes(torch.zeros(1, dtype=torch.uint8))
            else:
                all_reduce_(grad, state, gck.Sign(32), group, validate="off")
        except CollectiveError as error:
            assert (grad == 1).all()
            assert state.worker is None
            if group.rank == 0:
                release.set()
            else:
                release.wait(60)
            return f"{type(error).__name__}: {error}"
        return "done"

    outcome = on_grid((2, 2), train)
    assert "CollectiveTimeoutError" in outcome[1]
    assert "PeerLostError" in outcome[0]
    assert "the other tier failed" in outcome[0]


def test_wrong_arguments() -> None:
    def wrong(group: HierarchicalGroup) -> None:
        member = SimulatedGroup(1).members[0]
        for size, error, text in (
            (0, ArgumentError, "at least 1, got 0"),
            (2.0, DtypeError, r"an int, got 2.0 \(float\)"),
            (True, DtypeError, r"an int, got True \(bool\)"),
        ):
            with pytest.raises(error, match=f"from_group: local_world_size must be {text}"):
                HierarchicalGroup.from_group(member, local_world_size=size)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="a HierarchicalGroup cannot be split"):
            HierarchicalGroup.from_group(group, local_world_size=1)
        with pytest.raises(DtypeError, match=r"mesh must be a DeviceMesh, got 'mesh' \(str\)"):
            HierarchicalGroup.from_mesh("mesh")
        with pytest.raises(ArgumentError, match="packed_all_reduce_: group must be flat, got <Hier"):
            packed_all_reduce_(torch.ones(9), torch.zeros(9), torch.zeros(9), group=group)
        # 25 elements in two shards of 13 and 12.
        with pytest.raises(ArgumentError, match="k must be at most the number of elements 12, got 13"):
            all_reduce_(torch.ones(25), None, gck.TopK(k=13), group)

    on_grid((2, 2), wrong)
