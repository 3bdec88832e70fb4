"""How ranks of a communicator find each other: by a group, or by a store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gck
from gck.collectives import SimulatedGroup
from gck.collectives.transports import nccl_rendezvous
from gck.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
)
from tests.nccl.ranks import on_threads

pytestmark = pytest.mark.usefixtures("fake")


def test_from_a_group() -> None:
    def rank_main(member: Any) -> tuple[int, int, list[int]]:
        with gck.NcclCommunicator.from_group(member) as comm:
            assert comm.timeout == 15
            return (
                comm.rank,
                comm.world_size,
                comm.all_gather(torch.tensor([comm.rank])).view(-1).tolist(),
            )

    assert SimulatedGroup(3, timeout=15).run(rank_main) == [(r, 3, [0, 1, 2]) for r in range(3)]


def test_from_the_world_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=9))
    try:
        with gck.NcclCommunicator.from_group() as comm:
            assert (comm.rank, comm.world_size, comm.timeout) == (0, 1, 9)
    finally:
        dist.destroy_process_group()


def test_from_a_store_which_forgets_the_id() -> None:
    store = dist.HashStore()

    def rank_main(rank: int) -> list[int]:
        totals = []
        for _ in range(2):  # the second must not find the first one's id
            with gck.NcclCommunicator.from_store(store, rank, 3, timeout=20) as comm:
                total = torch.tensor([1])
                comm.all_reduce(total)
                totals.append(total.item())
        return totals

    assert on_threads(3, rank_main) == [[3, 3]] * 3
    for generation in (1, 2):
        assert not store.check([f"gck/nccl/{generation}/cards"])


def test_a_store_where_ranks_do_not_come() -> None:
    for rank in (0, 1):
        with pytest.raises(CollectiveTimeoutError, match=f"store on rank {rank} of 2"):
            gck.NcclCommunicator.from_store(dist.HashStore(), rank, 2, timeout=0.3)


@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_that_gave_up_is_met_again(early: int) -> None:
    """One comes too early, alone, and waits in vain; then both, on the same store."""
    store = dist.HashStore()
    with pytest.raises(CollectiveTimeoutError):
        gck.NcclCommunicator.from_store(store, early, 2, timeout=0.3)

    def rank_main(rank: int) -> int:
        with gck.NcclCommunicator.from_store(store, rank, 2, timeout=20) as comm:
            total = torch.tensor([rank + 1])
            comm.all_reduce(total)
            return int(total)

    assert on_threads(2, rank_main) == [3, 3]


def test_a_rank_answers_the_attempt_that_rank_0_makes_next() -> None:
    """Rank 1 waits for longer than rank 0, which gives up with three ranks and tries again with two."""
    store = dist.HashStore()

    def rank_main(rank: int) -> int:
        if rank == 0:
            with pytest.raises(CollectiveTimeoutError):
                gck.NcclCommunicator.from_store(store, 0, 3, timeout=0.5)
        with gck.NcclCommunicator.from_store(store, rank, 2, timeout=20) as comm:
            return comm.world_size

    assert on_threads(2, rank_main) == [2, 2]


def test_ranks_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    real, texts = nccl_rendezvous._own_card, []

    def run(change: Any, world_size: int = 3) -> list[str]:
        def own_card(rank: int, size: int) -> tuple[bytes, Any]:
            return change(rank, *real(rank, size)) if rank == 1 else real(rank, size)

        def rank_main(member: Any) -> str:
            try:
                gck.NcclCommunicator.from_group(member)
            except (CollectiveError, BackendUnavailableError) as error:
                return f"{type(error).__name__}: {error}"
            return "joined"

        monkeypatch.setattr(nccl_rendezvous, "_own_card", own_card)
        return SimulatedGroup(world_size, timeout=15).run(rank_main)

    def other_version(rank: int, card: bytes, error: Any) -> tuple[bytes, Any]:
        magic, has, _, size, unique_id = nccl_rendezvous.CARD.unpack(card)
        return nccl_rendezvous.CARD.pack(magic, has, 21805, size, unique_id), error

    texts = run(other_version)
    assert len(set(texts)) == 1
    assert texts[0].startswith(CollectiveMismatchError.__name__)
    assert "rank 1 has NCCL 2.18.5, rank 0 has 2.32.3" in texts[0]

    def no_library(rank: int, card: bytes, error: Any) -> tuple[bytes, Any]:
        missing = BackendUnavailableError("NCCL is not installed")
        return nccl_rendezvous.CARD.pack(b"GCKN", False, 0, 3, b""), missing

    texts = run(no_library)
    assert texts[1] == "BackendUnavailableError: NCCL is not installed"
    assert texts[0] == texts[2]
    assert "rank 1 cannot use NCCL" in texts[0]

    def other_size(rank: int, card: bytes, error: Any) -> tuple[bytes, Any]:
        magic, has, version, _, unique_id = nccl_rendezvous.CARD.unpack(card)
        return nccl_rendezvous.CARD.pack(magic, has, version, 4, unique_id), error

    texts = run(other_size)
    assert len(set(texts)) == 1
    assert "rank 1 is one of 4 ranks, rank 0 one of 3" in texts[0]
