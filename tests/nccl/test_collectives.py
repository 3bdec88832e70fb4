"""Every collective of gck over NCCL: the bytes of simulated ranks, which are compared with the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gck.collectives import (
    HierarchicalGroup,
    NcclCommunicator,
    SimulatedGroup,
    all_reduce_,
    sparse_all_gather,
)
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveMismatchError
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from gck.payload import SparseGrad
from tests.collectives import launcher, scenarios
from tests.nccl.library import fake_library
from tests.nccl.ranks import run_ranks


def simulated(world_size: int) -> list[dict[str, tuple[str, str]]]:
    return SimulatedGroup(world_size, timeout=30).run(lambda m: scenarios.run(m.rank, world_size, m))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_threads_have_the_bytes_of_simulated_ranks(world_size: int) -> None:
    results = run_ranks(world_size, lambda comm: scenarios.run(comm.rank, world_size, comm))
    assert results == simulated(world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_have_the_bytes_of_simulated_ranks(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCK_NCCL_LIBRARY", str(fake_library()))
    reports = launcher.run_ranks("tests.nccl.process_worker", world_size, tmp_path)
    for rank, expected in enumerate(simulated(world_size)):
        found = {name: tuple(digests) for name, digests in reports[rank]["scenarios"].items()}
        assert found == expected
        assert reports[rank]["again"] == reports[rank]["scenarios"]
        assert reports[rank]["ddp"], "a model differs from the one whose gradients went over gloo"


@pytest.mark.usefixtures("fake")
def test_a_mismatch_leaves_it_usable() -> None:
    def rank_main(comm: Any) -> float:
        grad, state = torch.ones(500 + comm.rank), ErrorFeedback()
        with pytest.raises(CollectiveMismatchError, match="differs from rank 0 in numel"):
            all_reduce_(grad, state, Sign(32), comm)
        assert (grad == 1).all()
        assert state.worker is None
        same = torch.ones(500)
        all_reduce_(same, state, Sign(32), comm, "sum")
        return same[0].item()

    assert run_ranks(2, rank_main) == [2.0, 2.0]


@pytest.mark.usefixtures("fake")
def test_own_operations_wait_for_what_is_in_flight() -> None:
    def reduce(comm: Any) -> tuple[Any, torch.Tensor]:
        grad = torch.full((100_000,), 1.0 + comm.rank)
        return all_reduce_(grad, ErrorFeedback(), Sign(32), comm, "sum", "two_phase", async_op=True), grad

    def rank_main(comm: Any) -> None:
        flying = [reduce(comm) for _ in range(3)]
        gathered = comm.all_gather(torch.tensor([comm.rank]))
        assert all(work.is_completed() for work, _ in flying)
        assert gathered.tolist() == [[0], [1]]
        flying += [reduce(comm) for _ in range(3)]
        peer, received = 1 - comm.rank, torch.zeros(4)
        with comm.group():
            comm.send(torch.full((4,), float(comm.rank)), peer)
            comm.recv(received, peer)
        assert received.tolist() == [float(peer)] * 4
        flying += [reduce(comm) for _ in range(3)]
        comm.close()
        assert all(work.is_completed() for work, _ in flying)
        assert all(bool((grad == 3).all()) for _, grad in flying)

    run_ranks(2, rank_main)


@pytest.mark.usefixtures("fake")
def test_payloads_that_are_no_single_body() -> None:
    def payload(rank: int) -> SparseGrad:
        indices = torch.tensor([rank, 40, 77], dtype=torch.int32)
        return SparseGrad(torch.tensor([1.0, 2.0, 3.0]) * (rank + 1), indices, 90)

    def rank_main(comm: Any) -> list[SparseGrad]:
        return sparse_all_gather(payload(comm.rank), comm)

    found = run_ranks(3, rank_main)
    expected = SimulatedGroup(3, timeout=20).run(rank_main)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.indices, b.indices)
            assert a.numel == b.numel == 90


@pytest.mark.usefixtures("fake")
def test_two_tiers() -> None:
    """Both groups come out of one communicator; the bytes are those of simulated ranks."""

    def rank_main(flat: Any) -> list[str]:
        group = HierarchicalGroup.from_group(flat, local_world_size=2)
        found = []
        for compressor, algorithm in ((Sign(32), "two_phase"), (TopK(ratio=0.1), "one_phase")):
            state, grad = ErrorFeedback(), scenarios.gradient(group.rank, 1001)
            all_reduce_(grad, state, compressor, group, algorithm=algorithm)
            found += [scenarios.digest(grad), scenarios.digest(state.worker, state.server)]
        for tier in (group.local, group.cross):
            if isinstance(tier, NcclCommunicator):
                tier.close()
        return found

    assert run_ranks(4, rank_main) == SimulatedGroup(4, timeout=30).run(rank_main)
