"""Real ranks over gloo: the bytes of simulated ranks, which test_all_reduce.py compares with the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

from gck.collectives import SimulatedGroup
from tests.collectives import scenarios
from tests.collectives.launcher import run_ranks


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_bytes_as_simulated_ranks(world_size: int, tmp_path: Path) -> None:
    simulated = SimulatedGroup(world_size, timeout=30).run(
        lambda member: scenarios.run(member.rank, world_size, member)
    )
    for name in simulated[0]:
        assert len({ranks[name][0] for ranks in simulated}) == 1, f"{name}: simulated ranks differ"
    assert len({ranks["gather"][1] for ranks in simulated}) == world_size  # digests do tell ranks apart

    reports = run_ranks("tests.collectives.process_worker", world_size, tmp_path)
    for rank, report in enumerate(reports):
        assert report["timeout"] == 30
        for name, (shared, own) in simulated[rank].items():
            assert report["scenarios"][name] == [shared, own], f"rank {rank}: {name}"
        assert report["again"] == report["scenarios"]
        assert report["unchanged"]
        assert f"rank {world_size - 1} differs from most ranks in numel (501, not 500)" in report["mismatch"]
