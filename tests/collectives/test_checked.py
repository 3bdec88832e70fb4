"""Messages damaged, cut, repeated or exchanged on their way: the same error on every rank, in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember
from gck.collectives.transports import CallLog, Transport
from gck.collectives.transports.checked import NBYTES, Checked
from gck.errors import CorruptPayloadError, GroupUnusableError

Damage = Callable[[Tensor, dict[str, Any]], None]


class Faulty:
    """A transport that damages what this rank receives in its n-th operation, above the network."""

    def __init__(self, inner: SimulatedMember, at: int, damage: Damage) -> None:
        self.inner, self.at, self.damage, self.count = inner, at, damage, 0
        self.kept: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def calls(self) -> CallLog:
        return self.inner.calls

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return self.received(self.inner.all_gather_bytes(send))

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self.received(self.inner.all_to_all_bytes(send))

    def received(self, rows: Tensor) -> Tensor:
        self.count += 1
        if self.count == self.at:
            self.damage(rows, self.kept)
        self.kept[tuple(rows.shape)] = rows.clone()
        return rows


def flip(place: int) -> Damage:
    def damage(rows: Tensor, kept: dict[str, Any]) -> None:
        rows[1, place] ^= 4

    return damage


def cut(rows: Tensor, kept: dict[str, Any]) -> None:
    rows[1, 30:] = 0


def repeat(rows: Tensor, kept: dict[str, Any]) -> None:
    rows[1] = kept[tuple(rows.shape)][1]


def exchange(rows: Tensor, kept: dict[str, Any]) -> None:
    rows[[0, 1]] = rows[[1, 0]]


@pytest.mark.parametrize(
    ("damage", "text", "rank"),
    [
        (flip(0), "was damaged", 1),
        (flip(49), "was damaged", 1),
        (flip(50), "was damaged", 1),  # the checksum itself
        (flip(58), "belongs to another operation", 1),
        (cut, "was damaged", 1),
        (repeat, "belongs to another operation", 1),
        (exchange, "", 0),
    ],
)
@pytest.mark.parametrize("operation", ["all_gather", "all_to_all"])
def test_damage_is_found_by_all(operation: str, damage: Damage, text: str, rank: int) -> None:
    def rank_main(member: SimulatedMember) -> list[str]:
        faulty = Faulty(member, 3 if member.rank == 2 else 0, damage)  # each operation is two: its verdict
        checked = Checked(faulty)
        assert isinstance(checked, Transport)
        outcomes = []
        for step in range(3):
            generator = torch.Generator().manual_seed(member.rank + 10 * step)
            send = torch.randint(256, (3, 50), dtype=torch.uint8, generator=generator)
            try:
                if operation == "all_gather":
                    rows = checked.all_gather_bytes(send[0])
                    assert torch.equal(rows[member.rank], send[0])
                else:
                    rows = checked.all_to_all_bytes(send)
                    assert torch.equal(rows[member.rank], send[member.rank])
                assert rows.shape == (3, 50)
                outcomes.append("")
            except CorruptPayloadError as error:
                outcomes.append(str(error))
        return outcomes

    found = SimulatedGroup(3, timeout=20).run(rank_main)
    assert found[0] == found[1] == found[2]
    first, second, third = found[0]
    assert first == third == ""
    assert f"{operation}: the message from rank {rank} to rank 2 {text}" in second


def test_what_it_costs() -> None:
    group = SimulatedGroup(3, timeout=20)
    group.run(lambda member: Checked(member).all_gather_bytes(torch.zeros(100, dtype=torch.uint8)))
    assert group.bytes_sent[0] == 2 * (100 + NBYTES + NBYTES)


def test_a_damaged_verdict_spoils_the_group() -> None:
    def rank_main(member: SimulatedMember) -> str:
        checked = Checked(Faulty(member, 2 if member.rank == 0 else 0, flip(9)))
        try:
            checked.all_gather_bytes(torch.zeros(9, dtype=torch.uint8))
            checked.barrier()
        except Exception as error:
            return type(error).__name__
        return ""

    outcomes = SimulatedGroup(3, timeout=20).run(rank_main)
    assert outcomes[0] == GroupUnusableError.__name__
    assert set(outcomes[1:]) <= {"PeerLostError", "CollectiveTimeoutError", "GroupUnusableError"}


def test_sums_are_compared() -> None:
    class Wrong(SimulatedMember):
        def all_reduce(self, tensor: Tensor) -> None:
            super().all_reduce(tensor)
            tensor[3] += self.rank == 1

    def rank_main(member: SimulatedMember, wrong: bool) -> str:
        if wrong:
            member.__class__ = Wrong
        tensor = torch.ones(9)
        try:
            Checked(member).all_reduce(tensor)
        except CorruptPayloadError as error:
            return str(error)
        assert tensor.tolist() == [3] * 9
        return ""

    group = SimulatedGroup(3, timeout=20)
    assert group.run(rank_main, False) == [""] * 3
    assert group.run(rank_main, True) == ["all_reduce: a message was damaged: ranks have different sums"] * 3
