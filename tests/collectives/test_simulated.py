"""The simulated group: what it moves, and how it fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember, Transport, resolve
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GroupUnusableError,
    PeerLostError,
)


def test_moves_bytes_in_rank_order() -> None:
    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor, Tensor]:
        gathered = member.all_gather_bytes(torch.tensor([member.rank, 9], dtype=torch.uint8))
        send = torch.tensor([[10 * member.rank + r] for r in range(3)], dtype=torch.uint8)
        swapped = member.all_to_all_bytes(send)
        send.zero_()  # the caller may reuse its buffer at once
        summed = torch.tensor([float(member.rank), 1.0])
        member.all_reduce(summed)
        member.barrier()
        return gathered, swapped, summed

    group = SimulatedGroup(3, timeout=20)
    for rank, (gathered, swapped, summed) in enumerate(group.run(rank_main)):
        assert gathered.tolist() == [[0, 9], [1, 9], [2, 9]]
        assert swapped.tolist() == [[rank], [10 + rank], [20 + rank]]
        assert summed.tolist() == [3.0, 3.0]
    assert group.bytes_sent == (2 * 2 + 2 * 1 + 2 * 8 * 2 // 3,) * 3


def test_results_and_arguments_of_run() -> None:
    group = SimulatedGroup(4)
    assert group.run(lambda member, x, y: member.rank * x + y, 10, 1) == [1, 11, 21, 31]
    assert group.run(lambda member: member.world_size) == [4] * 4
    assert all(isinstance(member, Transport) for member in group.members)
    assert resolve(group.members[1]) is group.members[1]
    assert resolve(group.members[1], timeout=3).timeout == 3


def test_first_exception_is_raised_and_others_are_released() -> None:
    group = SimulatedGroup(3, timeout=60)
    seen: list[Exception] = []

    def rank_main(member: SimulatedMember) -> None:
        if member.rank == 1:
            raise KeyError("broken model")
        try:
            member.barrier()
        except PeerLostError as error:
            seen.append(error)
            raise

    began = time.monotonic()
    with pytest.raises(KeyError, match="broken model"):
        group.run(rank_main)
    assert time.monotonic() - began < 10
    assert any("rank 1 left: it raised KeyError" in str(error) for error in seen)
    with pytest.raises(GroupUnusableError, match="rank 1 left"):
        group.run(lambda member: None)


def test_rank_that_returns_early_is_lost() -> None:
    with pytest.raises(PeerLostError, match="rank 2 left: it returned"):
        SimulatedGroup(3, timeout=60).run(lambda m: None if m.rank == 2 else m.barrier())


def test_stalled_rank_is_a_timeout() -> None:
    release = threading.Event()
    errors: list[Any] = []

    def rank_main(member: SimulatedMember) -> None:
        if member.rank == 0:
            release.wait(20)
            with pytest.raises(PeerLostError, match=r"a peer gave up: .* no answer from ranks \[0\]"):
                member.all_gather_bytes(torch.zeros(1, dtype=torch.uint8))
            return
        try:
            member.with_timeout(0.2).all_gather_bytes(torch.zeros(1, dtype=torch.uint8))
        except CollectiveTimeoutError as error:
            errors.append(str(error))
        with pytest.raises(GroupUnusableError):
            member.barrier()
        release.set()

    SimulatedGroup(2, timeout=60).run(rank_main)
    assert "no answer from ranks [0] within 0.2 s" in errors[0]


def test_abort_releases_the_others() -> None:
    def rank_main(member: SimulatedMember) -> None:
        if member.rank == 0:
            time.sleep(0.05)
            member.abort("out of memory")
        else:
            member.barrier()

    with pytest.raises(PeerLostError, match="rank 0 aborted: out of memory"):
        SimulatedGroup(2, timeout=60).run(rank_main)


@pytest.mark.parametrize("kind", ["size", "operation"])
def test_unequal_calls_are_reported(kind: str) -> None:
    def rank_main(member: SimulatedMember) -> None:
        send = torch.zeros(4 + (kind == "size") * member.rank, dtype=torch.uint8)
        if kind == "operation" and member.rank:
            member.barrier()
        else:
            member.all_gather_bytes(send)

    with pytest.raises(CollectiveMismatchError, match=r"rank \d calls \w+ with .*, rank \d calls \w+ with"):
        SimulatedGroup(2, timeout=20).run(rank_main)


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="world_size must be a positive int, got 0"):
        SimulatedGroup(0)
    with pytest.raises(ArgumentError, match="timeout must be a positive number of seconds, got 0"):
        SimulatedGroup(2, timeout=0)
    with pytest.raises(ArgumentError, match="send must have 2 rows"):
        SimulatedGroup(2).run(lambda m: m.all_to_all_bytes(torch.zeros(3, 1, dtype=torch.uint8)))


def test_operations_that_start() -> None:
    """Two under way at once, of different kinds, waited for in the order of their starts."""

    def rank_main(member: SimulatedMember) -> tuple[list[list[int]], list[list[int]]]:
        send = torch.tensor([[10 * member.rank + r] for r in range(3)], dtype=torch.uint8)
        swap = member.start_all_to_all_bytes(send)
        send.zero_()  # it has been posted
        gather = member.start_all_gather_bytes(torch.tensor([member.rank], dtype=torch.uint8))
        return swap.wait().tolist(), gather.wait().tolist()

    group = SimulatedGroup(3, timeout=20)
    for rank, (swapped, gathered) in enumerate(group.run(rank_main)):
        assert swapped == [[rank], [10 + rank], [20 + rank]]
        assert gathered == [[0], [1], [2]]
    assert group.bytes_sent == (2 + 2,) * 3


def test_a_started_operation_ends_though_a_rank_has_left() -> None:
    """It has posted what it had to; only what it has not started is lost."""

    def rank_main(member: SimulatedMember) -> list[list[int]]:
        gather = member.start_all_gather_bytes(torch.tensor([member.rank], dtype=torch.uint8))
        if member.rank == 1:
            return []
        gathered: list[list[int]] = gather.wait().tolist()
        with pytest.raises(PeerLostError, match="rank 1 left"):
            member.start_all_gather_bytes(torch.tensor([9], dtype=torch.uint8)).wait()
        return gathered

    assert SimulatedGroup(2, timeout=20).run(rank_main) == [[[0], [1]], []]


@pytest.mark.parametrize("shared", [False, True])
def test_gathers_may_be_shared(shared: bool) -> None:
    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        half = member.split(member.rank % 2)
        send = torch.tensor([member.rank], dtype=torch.uint8)
        return member.all_gather_bytes(send), half.all_gather_bytes(send)

    results = SimulatedGroup(4, timeout=20, shared_gathers=shared).run(rank_main)
    for rank, (all_of_them, of_half) in enumerate(results):
        assert all_of_them.view(-1).tolist() == [0, 1, 2, 3]
        assert of_half.view(-1).tolist() == [rank % 2, rank % 2 + 2]
    for operation, different in ((0, 1), (1, 2)):
        places = {result[operation].data_ptr() for result in results}
        assert len(places) == (different if shared else 4)
