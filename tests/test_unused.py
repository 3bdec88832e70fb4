"""Which gradients have anything in them on some rank; in DDP itself: collectives/ddp_training.py."""

from __future__ import annotations

import pytest
import torch

from gck.collectives import HierarchicalGroup, SimulatedGroup, SimulatedMember
from gck.errors import CorruptPayloadError, PeerLostError
from gck.integrations.unused import used_somewhere
from tests.collectives.grid import on_grid
from tests.collectives.test_checked import Faulty, flip

ZEROS = torch.zeros(5)


def grads_of(rank: int) -> list[torch.Tensor]:
    """The second is nowhere used, the third by rank 1 alone, the fourth has a zero of either sign."""
    nan = torch.tensor([0.0, float("nan")])
    signed = torch.tensor([0.0, -0.0])
    return [torch.ones(3), ZEROS, nan if rank == 1 else ZEROS, signed, torch.zeros(0), -torch.ones(1)]


USED = [True, False, True, False, False, True]


@pytest.mark.parametrize("checksum", [False, True])
def test_ranks_and_tiers_agree(checksum: bool) -> None:
    def on_tiers(group: HierarchicalGroup) -> list[bool]:
        return used_somewhere("f", grads_of(group.rank), group, checksum=checksum)

    def on_rank(member: SimulatedMember) -> list[bool]:
        return used_somewhere("f", grads_of(member.rank), member, checksum=checksum)

    assert on_grid((2, 2), on_tiers) == [USED] * 4
    assert SimulatedGroup(3).run(on_rank) == [USED] * 3


def test_alone_nothing_is_sent() -> None:
    member = SimulatedGroup(1).members[0]
    assert used_somewhere("f", grads_of(1), member, checksum=True) == USED
    assert member.calls.sequence == 0


def test_damage_is_everybodys_error_and_the_group_goes_on() -> None:
    def rank_main(member: SimulatedMember) -> list[bool]:
        transport = Faulty(member, 1, flip(2)) if member.rank == 0 else member
        with pytest.raises(CorruptPayloadError, match="damaged"):
            used_somewhere("f", grads_of(member.rank), transport, checksum=True)
        return used_somewhere("f", grads_of(member.rank), member, checksum=True)

    assert SimulatedGroup(2).run(rank_main) == [USED] * 2


def test_an_error_of_one_rank_gives_the_group_up() -> None:
    def rank_main(member: SimulatedMember) -> None:
        if member.rank == 0:
            with pytest.raises(NotImplementedError, match="meta"):
                used_somewhere("f", [torch.ones(1, device="meta")], member)
        else:
            with pytest.raises(PeerLostError, match="NotImplementedError in f"):
                used_somewhere("f", grads_of(1), member)

    SimulatedGroup(2).run(rank_main)
