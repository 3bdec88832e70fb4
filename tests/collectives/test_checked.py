"""Messages damaged, cut, repeated or exchanged on their way: the same error on every rank, in step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives import HierarchicalGroup, SimulatedGroup, SimulatedMember, all_reduce_
from gck.collectives.transports import CallLog, Transport
from gck.collectives.transports.checked import NBYTES, Checked
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    AutogradError,
    BackendUnavailableError,
    CollectiveMismatchError,
    CorruptPayloadError,
    GckError,
    GroupUnusableError,
)
from gck.kernels.sign import Sign

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


@pytest.mark.parametrize("place", [1, 3], ids=["the all-to-all", "the all-gather"])
def test_all_reduce(place: int) -> None:
    def rank_main(member: SimulatedMember, checksum: bool) -> list[Any]:
        state, outcomes = ErrorFeedback(), []
        for step in range(3):
            fault = place if step == 1 and member.rank == 2 and checksum else 0
            faulty = Faulty(member, fault, flip(20))
            grad = torch.randn(500, generator=torch.Generator().manual_seed(member.rank + 10 * step))
            if step == 1 and not checksum:
                continue
            before = [t.clone() for t in (grad, state.worker, state.server) if t is not None]
            try:
                all_reduce_(
                    grad, state, Sign(32), faulty, algorithm="two_phase", validate="off", checksum=checksum
                )
                outcomes.append(grad)
            except CorruptPayloadError:
                after = (grad, state.worker, state.server)
                outcomes.append(all(map(torch.equal, before, after)))
        return outcomes

    plain = SimulatedGroup(3, timeout=20).run(rank_main, False)
    checked = SimulatedGroup(3, timeout=20).run(rank_main, True)
    for (first, last), (mine, unchanged, again) in zip(plain, checked, strict=True):
        assert unchanged is True
        assert torch.equal(first, mine)
        assert torch.equal(last, again)


def test_ranks_must_agree_on_checksums() -> None:
    def rank_main(member: SimulatedMember) -> str:
        try:
            all_reduce_(torch.ones(99), None, Sign(32), member, checksum=member.rank == 1)
        except CollectiveMismatchError as error:
            return str(error)
        return ""

    for text in SimulatedGroup(3, timeout=20).run(rank_main):
        assert "rank 1 differs from most ranks in compressor" in text
        assert "Sign(chunk_size=32" in text


def test_messages_for_others_are_found() -> None:
    """Rank 1 gets what rank 0 has sent to rank 2."""

    class Crossed(Faulty):
        def all_to_all_bytes(self, send: Tensor) -> Tensor:
            rows = self.inner.all_gather_bytes(send.reshape(-1)).view(3, 3, -1)
            received = rows[:, self.inner.rank].clone()
            if self.inner.rank == 1:
                received[0] = rows[0, 2]
            return received

    def rank_main(member: SimulatedMember) -> str:
        send = torch.full((3, 40), member.rank, dtype=torch.uint8)
        try:
            Checked(Crossed(member, 0, cut)).all_to_all_bytes(send)
        except CorruptPayloadError as error:
            return str(error)
        return ""

    for text in SimulatedGroup(3, timeout=20).run(rank_main):
        assert "the message from rank 0 to rank 1" in text


def test_damage_in_one_tier_spoils_both() -> None:
    """Only the ranks of that tier know: the others cannot follow, and the group is not usable for anybody."""

    def rank_main(member: SimulatedMember) -> list[str]:
        group = HierarchicalGroup.from_group(member, local_world_size=2)
        if member.rank == 1:
            group.local = Faulty(group.local, 1, flip(3))  # type: ignore[arg-type]
        kinds = []
        for _ in range(2):
            grad = torch.randn(500)
            before = grad.clone()
            try:
                all_reduce_(grad, None, Sign(32), group, checksum=True, validate="off")
            except GckError as error:
                kinds.append(type(error).__name__)
                assert torch.equal(grad, before)
        return kinds

    outcomes = SimulatedGroup(4, timeout=10).run(rank_main)
    assert [kinds[0] for kinds in outcomes[:2]] == ["CorruptPayloadError"] * 2
    lost = {"PeerLostError", "GroupUnusableError", "CollectiveTimeoutError"}
    assert {kind for kinds in outcomes for kind in kinds[1:]} <= lost
    assert [len(kinds) for kinds in outcomes] == [2] * 4


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


def test_without_xxhash_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    group = SimulatedGroup(3, timeout=20)

    def rank_main(member: SimulatedMember) -> None:
        with pytest.raises(BackendUnavailableError, match="pip install xxhash"):
            all_reduce_(torch.ones(99), None, Sign(32), member, checksum=True)

    group.run(rank_main)
    assert group.bytes_sent == (0, 0, 0)


def test_gradients_of_inference_mode_are_refused() -> None:
    """Outside of it torch would raise only once they have been written."""
    with torch.inference_mode():
        grad = torch.ones(99)
    member, state = SimulatedGroup(1).members[0], ErrorFeedback()
    with pytest.raises(AutogradError, match="inference mode"):
        all_reduce_(grad, state, Sign(32), member)
    assert torch.equal(grad, torch.ones(99))
    assert state.worker is None
