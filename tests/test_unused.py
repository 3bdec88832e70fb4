"""Which gradients have anything in them on some rank; in DDP itself: collectives/ddp_training.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gck
from gck.collectives import HierarchicalGroup, SimulatedGroup, SimulatedMember
from gck.collectives.transports.checked import NBYTES
from gck.errors import CollectiveMismatchError, CorruptPayloadError, PeerLostError
from gck.integrations import ddp, unused
from gck.integrations.unused import used_somewhere
from tests.collectives.grid import on_grid
from tests.collectives.test_checked import Faulty, flip
from tests.test_ddp import Bucket

ZEROS = torch.zeros(5)


def grads_of(rank: int) -> list[torch.Tensor]:
    """The second is nowhere used, the third by rank 1 alone, the fourth has a zero of either sign."""
    nan = torch.tensor([0.0, 0.0, 0.0, 0.0, float("nan")])
    signed = torch.tensor([0.0, -0.0])
    return [torch.ones(3), ZEROS, nan if rank == 1 else ZEROS, signed, torch.zeros(0), -torch.ones(1)]


USED = [True, False, True, False, False, True]


@pytest.mark.parametrize("checksum", [False, True])
def test_ranks_and_tiers_agree(checksum: bool) -> None:
    def on_tiers(group: HierarchicalGroup) -> list[bool]:
        return used_somewhere("f", grads_of(group.rank), (), group, checksum=checksum)

    def on_rank(member: SimulatedMember) -> list[bool]:
        return used_somewhere("f", grads_of(member.rank), (), member, checksum=checksum)

    assert on_grid((2, 2), on_tiers) == [USED] * 4
    assert SimulatedGroup(3).run(on_rank) == [USED] * 3


def test_alone() -> None:
    assert used_somewhere("f", grads_of(1), (), SimulatedGroup(1).members[0], checksum=True) == USED


def test_damage_is_everybodys_error_and_the_group_goes_on() -> None:
    def rank_main(member: SimulatedMember) -> list[bool]:
        # After the handshake and its verdict.
        transport = Faulty(member, 3, flip(2)) if member.rank == 0 else member
        with pytest.raises(CorruptPayloadError, match="damaged"):
            used_somewhere("f", grads_of(member.rank), (), transport, checksum=True)
        return used_somewhere("f", grads_of(member.rank), (), member, checksum=True)

    assert SimulatedGroup(2).run(rank_main) == [USED] * 2


def state_of(model: nn.Module, member: SimulatedMember, **options: Any) -> ddp.HookState:
    state = ddp.HookState(gck.Sign(32), model=model, group=member, bypass_1d=False, bypass_numel=0, **options)
    state.finds_unused = True  # a DDP module would need a process group
    return state


def hooked(state: ddp.HookState, *grads: Tensor) -> Tensor:
    parameters = list(state._parameters)
    bucket = Bucket(parameters, torch.cat([grad.reshape(-1) for grad in grads]))
    ddp.hook(state, bucket)
    return bucket.flat


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"checksum": True}, "differs from rank 0 in compressor or an option"),
        ({"finds_unused": False}, "differs from rank 0 in"),
    ],
)
def test_ranks_that_look_for_something_else(options: dict[str, Any], fields: str) -> None:
    """Before flags are sent, whose sizes would differ; and the group stays usable."""

    def rank_main(member: SimulatedMember) -> None:
        state = state_of(nn.Linear(8, 8), member)
        for name, value in options.items() if member.rank == 1 else ():
            setattr(state, name, value)
        with pytest.raises(CollectiveMismatchError, match=fields):
            hooked(state, torch.ones(64), torch.ones(8))
        for name in options:
            setattr(state, name, True)
        hooked(state, torch.ones(64), torch.ones(8))

    SimulatedGroup(2).run(rank_main)


@pytest.mark.parametrize("checksum", [False, True])
def test_flags_are_sealed_and_zeros_have_one_sign(checksum: bool) -> None:
    def rank_main(member: SimulatedMember) -> tuple[Tensor, int]:
        sent: list[int] = []

        class Recorded(Faulty):
            def all_gather_bytes(self, send: Tensor) -> Tensor:
                sent.append(send.numel())
                return super().all_gather_bytes(send)

        state = state_of(nn.Linear(8, 8), member, checksum=checksum)
        state.group = Recorded(member, 0, flip(0))
        zero = torch.full((8,), -0.0 if member.rank else 0.0)
        return hooked(state, torch.ones(64), zero), sent[2 if checksum else 1]

    for result, nbytes in SimulatedGroup(2).run(rank_main):
        assert not result[64:].view(torch.int32).any()
        assert nbytes == 2 + NBYTES * checksum


def test_an_error_of_one_rank_gives_the_group_up() -> None:
    """Also where it comes when peers have the flags."""

    def rank_main(member: SimulatedMember) -> None:
        state = state_of(nn.Linear(8, 8), member)
        if member.rank == 0:
            state.compressor_of = failing  # type: ignore[method-assign]
            with pytest.raises(MemoryError):
                unused.reduce_used("f", state, pairs(state), member, lambda: None, warm_up=False)
        else:
            with pytest.raises(PeerLostError, match="MemoryError in f"):
                unused.reduce_used("f", state, pairs(state), member, lambda: None, warm_up=False)

    def failing(parameter: Tensor) -> None:
        raise MemoryError

    def pairs(state: ddp.HookState) -> list[tuple[Tensor, Tensor]]:
        return list(zip(state._parameters, (torch.ones(64), torch.zeros(8)), strict=True))

    SimulatedGroup(2).run(rank_main)
