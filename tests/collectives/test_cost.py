"""The cost model against what ranks send in fact."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import gck
from gck.collectives import (
    Link,
    SimulatedGroup,
    all_reduce_cost,
    break_even_density,
    choose_algorithm,
    compute,
    hierarchical_cost,
    measure_compute,
)
from gck.collectives.cost import Cost
from gck.collectives.transports.simulated import SimulatedMember
from gck.errors import ArgumentError, DtypeError

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
    ]
    + [(gck.RandomK(ratio=0.1, seed=0), a) for a in ("auto", "one_phase", "seeded")]
    + [(gck.LowRank(rank=2), a) for a in ("auto", "factored", "dense")],
    ids=str,
)
def test_bytes_and_messages_are_those_that_are_sent(compressor: Any, algorithm: str) -> None:
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
            assert set(group.messages_sent) == {cost.messages}


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
    assert (cost.messages, cost.rounds) == (6, 6)  # messages of 36 KiB go one after the other
    assert all_reduce_cost(gck.Sign(), [1 << 18], 4, "two_phase").rounds == 1 + 3
    # 4 rows of 100,000 floats, and 4 of 10, each in four parts: long messages, then short ones.
    factors = all_reduce_cost(gck.LowRank(rank=4, columns=10), [1_000_000], 4, "factored")
    assert (factors.messages, factors.rounds) == (12, (3 + 3) + (1 + 3))
    link = Link(latency=0.001, bandwidth=125e6)
    assert cost.seconds(link) == pytest.approx(0.006 + cost.nbytes / 125e6)


def test_pieces_hide_the_shorter_of_bytes_and_compute() -> None:
    cost = Cost("one_phase", nbytes=4_000_000, messages=3, rounds=3)
    link = Link(latency=0.001, bandwidth=1e6)  # 4 s
    assert cost.seconds(link, 1.0) == pytest.approx(5.003)
    assert cost.seconds(link, 1.0, pieces=4) == pytest.approx(4.253)
    assert cost.seconds(link, 8.0, pieces=4) == pytest.approx(9.003)
    for pieces in (0, True, 1.5):
        with pytest.raises(ArgumentError, match=f"pieces must be a positive int, got {pieces}"):
            cost.seconds(link, 1.0, pieces=pieces)  # type: ignore[arg-type]


def test_a_burst_is_taken_off() -> None:
    """Of bytes that there are."""
    bucket = Link(latency=0.001, bandwidth=1e6, burst=50_000)
    for nbytes, at_once in ((4_000_000, 0.05), (20_000, 0.02)):
        cost = Cost("one_phase", nbytes=nbytes, messages=3, rounds=3)
        assert cost.seconds(bucket, 0.5) == pytest.approx(0.503 + nbytes / 1e6 - at_once)
        assert cost.seconds(bucket, 0.5, pieces=8) >= 0.5
    assert Link.ethernet(1e8, burst=8192).burst == 8192
    with pytest.raises(ArgumentError, match="Link: burst must be at least 0 bytes, got -1"):
        Link(0.001, 1e6, burst=-1)


def test_terms_of_the_time() -> None:
    link = Link.ethernet(1e8, latency=0.0005)
    assert link.bandwidth == pytest.approx(12.5e6 * 1448 / 1547)
    assert Link.ethernet(1e8, mtu=9000).bandwidth == pytest.approx(12.5e6 * 8948 / 9047)
    cost = all_reduce_cost(gck.Quantize(), [1 << 20], 4, "two_phase")
    assert cost.seconds(link, compute=0.25) == pytest.approx(0.25 + cost.seconds(link))
    with pytest.raises(ArgumentError, match="mtu must be above 52 bytes, got 52"):
        Link.ethernet(1e8, mtu=52)


@pytest.mark.parametrize(
    "compressor", [*COMPRESSORS, gck.RandomK(ratio=0.1, seed=0), gck.LowRank(rank=2)], ids=str
)
def test_compute_is_that_of_a_whole_all_reduce(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def spy(grad: torch.Tensor, state: Any, used: Any, transport: Any, **options: Any) -> None:
        gck.all_reduce_(grad, state, used, transport, **options)
        calls.append((grad.clone(), options["algorithm"]))

    monkeypatch.setattr(compute, "all_reduce_", spy)
    began, before = time.perf_counter(), [0]
    seconds = measure_compute(compressor, 1000, 5, repeats=2, before=lambda: before.append(0))
    assert 0 < seconds < time.perf_counter() - began
    assert len(calls) == len(before) - 1 == 3
    grad, algorithm = calls[0]
    assert algorithm == choose_algorithm(compressor, [1000], 5)
    # Five ranks that say the same: in one phase the mean is what one of them says.
    if algorithm == "one_phase":
        alone = torch.randn(grad.numel(), generator=torch.Generator().manual_seed(0))
        gck.all_reduce_(
            alone, gck.ErrorFeedback(), compressor, SimulatedGroup(1).members[0], algorithm=algorithm
        )
        torch.testing.assert_close(grad, alone)
    assert grad.isfinite().all()
    assert grad.any()


def test_compute_where_the_last_shard_is_short() -> None:
    compressor = gck.ChunkTopK(k=32, chunk_size=64)
    assert choose_algorithm(compressor, [1000], 10) == "two_phase"
    for numel in (1, 1000, 1025):
        assert measure_compute(compressor, numel, 10, "two_phase", repeats=1) > 0


def test_compute_is_made_where_it_is_said() -> None:
    with torch.device("meta"):  # whatever torch makes tensors on otherwise
        assert measure_compute(gck.Sign(), 1000, 2, repeats=1) > 0


@pytest.mark.parametrize("wrong", [{"numel": 0}, {"world_size": True}, {"repeats": 0}])
def test_wrong_arguments_of_compute(wrong: dict[str, Any]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ArgumentError, match=f"{name} must be a positive int, got {value}"):
        measure_compute(gck.Sign(), **{"numel": 10, "world_size": 2, **wrong})


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="world_size must be a positive int, got 0"):
        all_reduce_cost(gck.Sign(), [10], 0)
    with pytest.raises(ArgumentError, match='"two_phase" is unknown, or not for TopK'):
        all_reduce_cost(gck.TopK(k=1), [10], 2, "two_phase")
    with pytest.raises(ArgumentError, match='"ring" is unknown'):
        all_reduce_cost(gck.Sign(), [10], 2, "ring")
    for call in (all_reduce_cost, choose_algorithm):
        with pytest.raises(ArgumentError, match=f"{call.__name__}: numels must be a sequence.*got 10"):
            call(gck.Sign(), 10, 2)  # type: ignore[arg-type]
        with pytest.raises(DtypeError, match=f"{call.__name__}: compressor must be a Compressor, got None"):
            call(None, [10], 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"hierarchical_cost: numels must be a sequence.*got 10"):
        hierarchical_cost(gck.Sign(), 10, 2, 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="bits_per_second must be a number, got '100mbit'"):
        Link.ethernet("100mbit")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="bandwidth must be above 0 bytes a second, got 0"):
        Link(0, 0)
    with pytest.raises(ArgumentError, match="latency must be at least 0 seconds, got -1"):
        Link(-1, 1)
    with pytest.raises(ArgumentError, match="got 0 and 8"):
        break_even_density(0)
