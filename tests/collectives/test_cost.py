"""The cost model against what ranks send in fact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gck
from gck.collectives import Link, SimulatedGroup, all_reduce_cost, break_even_density
from gck.collectives.transports.simulated import SimulatedMember
from gck.errors import ArgumentError

COMPRESSORS = [
    gck.TopK(ratio=0.01),
    gck.ChunkTopK(k=4, chunk_size=256, value_bits=2),
    gck.ChunkTopK(k=4, chunk_size=256, server_k=3),
    gck.Sign(),
    gck.Quantize(),
]


@pytest.mark.parametrize(
    ("compressor", "algorithm"),
    [
        (c, a)
        for c in COMPRESSORS
        for a in ("auto", "dense", "one_phase", "two_phase")
        if a != "two_phase" or c.shard_unit is not None
    ],
    ids=str,
)
def test_bytes_are_those_that_are_sent(compressor: Any, algorithm: str) -> None:
    for world_size in (1, 2, 3, 8, 40):
        for numel in (1, 1000, 10_001):
            group = SimulatedGroup(world_size)

            def reduce(member: SimulatedMember, numel: int = numel) -> None:
                gck.all_reduce_(
                    torch.ones(numel), None, compressor, member, algorithm=algorithm, validate="off"
                )

            group.run(reduce)
            cost = all_reduce_cost(compressor, [numel], world_size, algorithm)
            assert set(group.bytes_sent) == {cost.nbytes}
            assert (cost.messages == 0) == (world_size == 1)


@pytest.mark.parametrize("world_size", [2, 5, 32])
def test_break_even(world_size: int) -> None:
    numel = 1_000_000
    dense = all_reduce_cost(gck.TopK(k=1), [numel], world_size, "dense").nbytes
    density = break_even_density(world_size)
    for factor in (0.99, 1.01):
        k = min(numel, int(factor * density * numel))
        sparse = all_reduce_cost(gck.TopK(k=k), [numel], world_size, "one_phase").nbytes
        assert (sparse < dense) == (factor < 1)
    assert break_even_density(world_size, entry_nbytes=6) == pytest.approx(min(1, 8 / (6 * world_size)))


def test_seconds() -> None:
    cost = all_reduce_cost(gck.Sign(), [1 << 20], 4, "two_phase")
    assert (cost.messages, cost.rounds) == (6, 4)
    link = Link(latency=0.001, bandwidth=125e6)
    assert cost.seconds(link) == pytest.approx(0.004 + cost.nbytes / 125e6)


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="world_size must be a positive int, got 0"):
        all_reduce_cost(gck.Sign(), [10], 0)
    with pytest.raises(ArgumentError, match='"two_phase" is unknown, or not for TopK'):
        all_reduce_cost(gck.TopK(k=1), [10], 2, "two_phase")
    with pytest.raises(ArgumentError, match='"ring" is unknown'):
        all_reduce_cost(gck.Sign(), [10], 2, "ring")
    with pytest.raises(ArgumentError, match="bandwidth must be above 0 bytes a second, got 0"):
        Link(0, 0)
    with pytest.raises(ArgumentError, match="latency must be at least 0 seconds, got -1"):
        Link(-1, 1)
    with pytest.raises(ArgumentError, match="got 0 and 8"):
        break_even_density(0)
