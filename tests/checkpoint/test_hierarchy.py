"""Residuals of two tiers, saved and loaded: the run goes on bit for bit, and only on the same topology."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import StateMismatchError

SIGN = gck.Sign(32)


def steps(member: SimulatedMember, local: int, residuals: gck.ErrorFeedbackMap, first: int) -> list[Tensor]:
    group = gck.HierarchicalGroup.from_group(member, local_world_size=local)
    results = []
    for step in range(first, first + 2):
        grad = torch.randn(500, generator=torch.Generator().manual_seed(10 * step + member.rank))
        gck.all_reduce_(grad, residuals["weight"], SIGN, group, algorithm="two_phase")
        results.append(grad)
    return results


def test_a_run_goes_on(tmp_path: Path) -> None:
    def before(member: SimulatedMember) -> list[Tensor]:
        residuals = gck.ErrorFeedbackMap()
        steps(member, 2, residuals, 0)
        place = {"rank": member.rank, "world_size": 4, "compressor": SIGN}
        gck.save_state(tmp_path, residuals, step=2, **place)
        return steps(member, 2, residuals, 2)

    def after(member: SimulatedMember) -> list[Tensor]:
        residuals = gck.ErrorFeedbackMap()
        loaded = gck.load_state(tmp_path, residuals, rank=member.rank, world_size=4, compressor=SIGN)
        assert loaded is not None
        assert loaded.step == 2
        assert residuals["weight"].shard is not None
        return steps(member, 2, residuals, 2)

    went_on = SimulatedGroup(4, timeout=20).run(before)
    resumed = SimulatedGroup(4, timeout=20).run(after)
    for mine, theirs in zip(went_on, resumed, strict=True):
        assert all(map(torch.equal, mine, theirs))

    def elsewhere(member: SimulatedMember) -> None:
        residuals = gck.ErrorFeedbackMap()
        gck.load_state(tmp_path, residuals, rank=member.rank, world_size=4, compressor=SIGN)
        with pytest.raises(StateMismatchError):
            steps(member, 4, residuals, 2)

    SimulatedGroup(4, timeout=20).run(elsewhere)
