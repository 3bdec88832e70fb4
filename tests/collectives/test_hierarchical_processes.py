"""Two tiers of real ranks over gloo: the bytes of simulated ranks, and what is left when one dies."""

from __future__ import annotations

from pathlib import Path

from gck import HierarchicalGroup
from gck.collectives import SimulatedGroup
from tests.collectives import hierarchical_worker
from tests.collectives.launcher import run_ranks


def test_two_nodes_of_two(tmp_path: Path) -> None:
    lost = hierarchical_worker.LOST
    simulated = SimulatedGroup(4, timeout=60).run(
        lambda member: hierarchical_worker.run(HierarchicalGroup.from_group(member, local_world_size=2))
    )
    reports = run_ranks("tests.collectives.hierarchical_worker", 4, tmp_path, lost=(lost,))
    survivors = [(rank, report) for rank, report in enumerate(reports) if rank != lost]
    for rank, report in survivors:
        assert (report["rank"], report["timeout"]) == ([rank, rank], 20)
        assert report["by_size"] == report["by_mesh"] == report["again"] == simulated[rank]
        mismatch, unequal, different = report["errors"]
        assert f"rank {lost} differs from most ranks in numel (501, not 500)" in mismatch
        assert "must divide the world size, got 3 and 4; nodes of unequal size" in unequal
        assert "ranks have different local_world_size: [1, 1, 1, 2]" in different
        assert "mesh must have two dimensions, nodes and local, got (4,)" in report["flat mesh"]
        assert report["trained"] == [survivors[0][1]["trained"][0], True]
        assert report["failure"][0] in ("PeerLostError", "CollectiveTimeoutError", "GroupUnusableError")
        assert report["failure"][1]
        assert f" of 2 (rank {rank} of all 4)" in report["failure"][2]
    for name, (shared, _) in simulated[0].items():
        assert {report["by_size"][name][0] for _, report in survivors} == {shared}
