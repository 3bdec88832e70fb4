"""Real ranks over gloo: the bytes of simulated ranks, which test_all_reduce.py compares with the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gck.collectives import SimulatedGroup, Transport, all_reduce_, resolve
from gck.collectives.transports import operation, process_group
from gck.errors import GroupUnusableError
from gck.kernels.sign import Sign
from tests.collectives import scenarios
from tests.collectives.launcher import run_ranks


@pytest.mark.parametrize(("world_size", "rounds"), [(2, ("0",)), (3, ("0",)), (4, ("100",))])
def test_same_bytes_as_simulated_ranks(world_size: int, rounds: tuple[str, ...], tmp_path: Path) -> None:
    simulated = SimulatedGroup(world_size, timeout=30).run(
        lambda member: scenarios.run(member.rank, world_size, member)
    )
    for name in simulated[0]:
        assert len({ranks[name][0] for ranks in simulated}) == 1, f"{name}: simulated ranks differ"
    assert len({ranks["gather"][1] for ranks in simulated}) == world_size  # digests do tell ranks apart

    reports = run_ranks("tests.collectives.process_worker", world_size, tmp_path, *rounds)
    for rank, report in enumerate(reports):
        assert report["timeout"] == 30
        for name, (shared, own) in simulated[rank].items():
            assert report["scenarios"][name] == [shared, own], f"rank {rank}: {name}"
        assert report["again"] == report["scenarios"]
        assert report["unchanged"]
        others = "rank 0" if world_size == 2 else "most ranks"
        assert f"rank {world_size - 1} differs from {others} in numel (501, not 500)" in report["mismatch"]


def test_abort_makes_a_process_group_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        transport = resolve()
        assert isinstance(transport, Transport)
        assert (transport.rank, transport.world_size) == (0, 1)
        assert resolve(timeout=1e9).timeout == transport.timeout  # no longer than the group's own
        assert transport.with_timeout(3).timeout == 3
        assert isinstance(transport, process_group.ProcessGroupTransport)
        recv = torch.zeros(9)
        under_way = operation.Operation(transport, "all_gather", (recv,), lambda: recv).start(object)
        transport.abort("no reason")
        transport.abort("again")
        with pytest.raises(GroupUnusableError, match="aborted: no reason"):
            under_way.wait()  # and does not return what has never come
        for call in (transport.barrier, lambda: all_reduce_(torch.ones(9), None, Sign(32))):
            with pytest.raises(GroupUnusableError, match="aborted: no reason"):
                call()
    finally:
        dist.destroy_process_group()
    with pytest.raises(GroupUnusableError):
        transport.barrier()


def test_a_group_that_was_destroyed_while_others_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says so in a type of its own up to 2.7."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        transport = resolve(group)
        dist.destroy_process_group(group)
        for call in (transport.barrier, lambda: all_reduce_(torch.ones(9), None, Sign(32), group)):
            with pytest.raises(GroupUnusableError, match="the group was destroyed; make a new one"):
                call()
        all_reduce_(torch.ones(9), None, Sign(32))
    finally:
        dist.destroy_process_group()
