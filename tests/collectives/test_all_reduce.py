"""The all-reduces against the oracle, on every rank, by their bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    all_reduce_,
    all_reduce_many_,
    choose_algorithm,
    packed_all_reduce_,
    two_phase,
)
from gck.collectives.transports import rotation
from gck.compressor import shard_numel
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.collectives import oracle

COMPRESSORS = [
    TopK(ratio=0.1),
    TopK(ratio=0.3, value_dtype=torch.bfloat16),
    Sign(32),
    Sign(256),
    ChunkTopK(k=5, chunk_size=32, value_bits=2),
    ChunkTopK(k=16, chunk_size=128),
    ChunkTopK(k=4, chunk_size=64, value_bits=32, server_k=7),
    Quantize(4, 64),
    TopK(ratio=0.1, decay=0.5, clip=0.3),
    Quantize(4, 64, decay=0.9, clip=0.1),
    Quantize(8, 32, "stochastic", seed=7),
    RandomK(ratio=0.2, seed=5),
    RandomK(ratio=0.4, seed=-5, value_dtype=torch.bfloat16),
]


def runs_on(compressor: Any, algorithm: str) -> bool:
    return algorithm != "two_phase" or compressor.shard_unit is not None


def gradient(rank: int, step: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(n, generator=generator).to(dtype)


def check_against_oracle(
    compressor: Any, algorithm: str, world_size: int, n: int, dtype: torch.dtype, op: str
) -> None:
    """Three steps, so that both residuals are used."""
    group = SimulatedGroup(world_size, timeout=20)
    states = [ErrorFeedback() for _ in range(world_size)]
    errs = [torch.zeros(n) for _ in range(world_size)]
    valid = oracle.valid_numels(n, compressor.shard_unit or 1, world_size)
    servers = [torch.zeros(numel) for numel in valid]

    def rank_main(member: SimulatedMember, step: int) -> Tensor:
        grad = gradient(member.rank, step, n, dtype)
        returned = all_reduce_(grad, states[member.rank], compressor, member, op, algorithm)
        assert returned is grad
        return grad

    for step in range(3):
        grads = [gradient(rank, step, n, dtype) for rank in range(world_size)]
        if algorithm == "two_phase":
            expected, errs, servers = oracle.two_phase(compressor, grads, errs, servers, op)
        else:
            expected, errs = oracle.one_phase(compressor, grads, errs, op)
        for rank, result in enumerate(group.run(rank_main, step)):
            state = states[rank]
            assert oracle.same(result, expected.to(dtype))
            assert state.worker is not None
            assert oracle.same(state.worker, errs[rank])
            if algorithm == "two_phase":
                assert state.server is not None
                assert state.server.numel() == shard_numel(n, compressor.shard_unit, world_size)
                assert oracle.same(state.server[: valid[rank]], servers[rank])


@pytest.mark.parametrize(
    ("compressor", "algorithm", "by_rows"),
    [
        (c, a, by_rows)
        for c in COMPRESSORS
        for a, by_rows in (("one_phase", False), ("two_phase", False), ("two_phase", True))
        if runs_on(c, a)
    ],
    ids=str,
)
def test_equals_oracle(
    compressor: Any, algorithm: str, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_rows:
        monkeypatch.setattr(rotation, "ROTATE_FROM", 0)
    for world_size in (1, 2, 3, 4, 7):
        for n in (0, 1, 2, 31, 257, 1001):
            check_against_oracle(compressor, algorithm, world_size, n, torch.float32, "avg")


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if runs_on(c, "two_phase")], ids=str)
def test_ranks_may_make_their_rows_as_they_like(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one or all at once: a message is the same, so that ranks on other devices understand it."""
    monkeypatch.setattr(two_phase._Job, "_rows_pay", lambda job, _: job.rank == 0 and job.cuts_short)
    for n in (31, 257, 1001):
        check_against_oracle(compressor, "two_phase", 3, n, torch.float32, "avg")


@settings(max_examples=40, deadline=None)
@given(
    compressor=st.sampled_from(COMPRESSORS),
    two=st.booleans(),
    world_size=st.integers(1, 9),
    n=st.integers(0, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    op=st.sampled_from(["avg", "sum"]),
)
def test_equals_oracle_random(
    compressor: Any, two: bool, world_size: int, n: int, dtype: torch.dtype, op: str
) -> None:
    algorithm = "two_phase" if two and compressor.shard_unit is not None else "one_phase"
    check_against_oracle(compressor, algorithm, world_size, n, dtype, op)


@pytest.mark.parametrize("arguments", [(-1, 32, 2), (100, 32, 0), (100, 0, 2), (100, None, 0)])
def test_shards_that_cannot_be(arguments: tuple[int, int | None, int]) -> None:
    with pytest.raises(ArgumentError, match="shard_numel: numel must be at least 0"):
        shard_numel(*arguments)


def test_world_of_64() -> None:
    check_against_oracle(Sign(32), "two_phase", 64, 1000, torch.float32, "avg")


@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("shape", [(0,), (1,), (37, 29)])
def test_packed_equals_oracle(op: str, shape: tuple[int, ...]) -> None:
    world_size, chunk, n = 3, 64, math.prod(shape)
    group, compressor = SimulatedGroup(world_size, timeout=20), Sign(chunk)
    errs = [torch.randn(n, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    servers = [torch.full((shard_numel(n, chunk, world_size),), 0.25) for _ in range(world_size)]
    valid = oracle.valid_numels(n, chunk, world_size)
    grads = [gradient(rank, 0, n).view(shape) for rank in range(world_size)]
    expected, new_errs, new_servers = oracle.two_phase(
        compressor, grads, errs, [s[:v] for s, v in zip(servers, valid, strict=True)], op
    )

    def rank_main(member: SimulatedMember) -> None:
        rank = member.rank
        packed_all_reduce_(grads[rank], errs[rank], servers[rank], chunk, member, op)

    group.run(rank_main)
    for rank in range(world_size):
        assert grads[rank].shape == shape
        assert oracle.same(grads[rank], expected)
        assert oracle.same(errs[rank], new_errs[rank])
        assert oracle.same(servers[rank][: valid[rank]], new_servers[rank])
        assert (servers[rank][valid[rank] :] == 0.25).all()


@pytest.mark.parametrize("algorithm", ["one_phase", "two_phase", "dense"])
def test_many_is_each_in_one_message_a_phase(algorithm: str) -> None:
    world_size, numels, compressor = 3, (1000, 0, 5, 257), Sign(32)
    messages = {"one_phase": 1, "two_phase": 2, "dense": 1}[algorithm]

    def many(member: SimulatedMember) -> list[Tensor]:
        grads = [gradient(member.rank, i, n) for i, n in enumerate(numels)]
        states = [ErrorFeedback() for _ in numels]
        for _ in range(2):
            all_reduce_many_(grads, states, compressor, member, algorithm=algorithm, validate="off")
        assert len(member._tickets) == 2 * messages
        return grads

    def single(member: SimulatedMember) -> list[Tensor]:
        grads = [gradient(member.rank, i, n) for i, n in enumerate(numels)]
        for grad in grads:
            state = ErrorFeedback()
            for _ in range(2):
                all_reduce_(grad, state, compressor, member, algorithm=algorithm)
        return grads

    together = SimulatedGroup(world_size, timeout=20).run(many)
    apart = SimulatedGroup(world_size, timeout=20).run(single)
    for rank in range(world_size):
        assert all(oracle.same(a, b) for a, b in zip(together[rank], apart[rank], strict=True))


def test_auto_does_not_depend_on_company() -> None:
    """3 elements go dense, 100,000 in two phases: each as it would alone."""
    numels, compressor = (3, 100_000, 0, 40_000), Sign(256)

    def rank_main(member: SimulatedMember) -> list[Tensor]:
        together = [gradient(member.rank, i, n) for i, n in enumerate(numels)]
        apart = [grad.clone() for grad in together]
        states = [ErrorFeedback() for _ in numels]
        all_reduce_many_(together, states, compressor, member)
        for grad in apart:
            all_reduce_(grad, ErrorFeedback(), compressor, member)
        assert all(oracle.same(a, b) for a, b in zip(together, apart, strict=True))
        assert [state.server is not None for state in states] == [False, True, False, True]
        return together

    results = SimulatedGroup(3, timeout=20).run(rank_main)
    assert all(oracle.same(a, b) for a, b in zip(results[0], results[2], strict=True))
    expected = torch.stack([gradient(rank, 0, 3) for rank in range(3)])
    assert oracle.same(results[0][0], (expected[0] + expected[1] + expected[2]) / 3)


def test_many_of_nothing() -> None:
    SimulatedGroup(2).run(lambda member: all_reduce_many_([], [], Sign(), member))


@pytest.mark.parametrize(
    ("compressor", "algorithm"),
    [
        (c, a)
        for c in (TopK(ratio=0.1), Sign(32), ChunkTopK(k=4, chunk_size=32), ChunkTopK(4, 32, 4))
        for a in ("one_phase", "two_phase", "dense")
        if runs_on(c, a)
    ],
    ids=str,
)
def test_nonfinite_reaches_every_rank_and_no_residual(compressor: Any, algorithm: str) -> None:
    states = [ErrorFeedback() for _ in range(3)]

    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        grad = gradient(member.rank, 0, 500)
        if member.rank == 1:
            grad[77], grad[400] = math.nan, math.inf
        all_reduce_(grad, states[member.rank], compressor, member, algorithm=algorithm)
        again = gradient(member.rank, 1, 500)
        all_reduce_(again, states[member.rank], compressor, member, algorithm=algorithm)
        return grad, again

    for grad, again in SimulatedGroup(3, timeout=20).run(rank_main):
        assert not grad[77].isfinite()
        assert not grad[400].isfinite()
        assert again.isfinite().all()
    for state in states:
        for residual in (state.worker, state.server):
            assert residual is None or residual.isfinite().all()
    if algorithm != "dense":
        assert states[1].nonfinite is not None
        assert int(states[1].nonfinite) >= 2


def test_dense_sends_and_clears_both_residuals() -> None:
    # Small integers: every sum is exact, so that the order of additions does not matter.
    world_size, n, unit = 2, 100, 32
    states = [ErrorFeedback() for _ in range(world_size)]

    def rank_main(member: SimulatedMember) -> Tensor:
        state = states[member.rank]
        all_reduce_(torch.zeros(n), state, Sign(unit), member, algorithm="two_phase")
        assert state.worker is not None
        assert state.server is not None
        state.worker.fill_(member.rank + 1)
        state.server.fill_(8 * (member.rank + 1))
        grad = torch.full((n,), 4.0)
        all_reduce_(grad, state, Sign(unit), member, algorithm="dense")
        assert not state.worker.any()
        assert not state.server.any()
        return grad

    # Mean of 4 + 1 and 4 + 2; shard 0 is elements 0..63.
    expected = torch.full((n,), 5.5)
    expected[:64] += 8
    expected[64:] += 16
    for grad in SimulatedGroup(world_size, timeout=20).run(rank_main):
        assert oracle.same(grad, expected)


def test_dense_reads_residuals_as_the_compressor_would() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        state = ErrorFeedback()
        state.worker = torch.tensor([4.0, -0.5, 1.0, 0.0])
        grad = torch.ones(4)
        return all_reduce_(grad, state, TopK(k=1, decay=0.5, clip=1.5), member, algorithm="dense")

    for result in SimulatedGroup(2, timeout=20).run(rank_main):
        assert result.tolist() == [2.5, 0.75, 1.5, 1.0]


def test_dense_allocates_no_residual() -> None:
    state = ErrorFeedback()
    SimulatedGroup(1).run(lambda m: all_reduce_(torch.ones(9), state, TopK(ratio=0.1), m, algorithm="dense"))
    assert state.worker is None


def test_without_error_feedback() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        return all_reduce_(gradient(member.rank, 0, 300), None, Sign(32), member, algorithm="two_phase")

    grads = [gradient(rank, 0, 300) for rank in range(2)]
    zeros = [torch.zeros(300)] * 2
    servers = [torch.zeros(n) for n in oracle.valid_numels(300, 32, 2)]
    expected = oracle.two_phase(Sign(32), grads, zeros, servers, "avg")[0]
    for grad in SimulatedGroup(2).run(rank_main):
        assert oracle.same(grad, expected)


@pytest.mark.parametrize(
    ("compressor", "numels", "world_size", "expected"),
    [
        (TopK(ratio=0.01), [10_000], 1, "dense"),
        (TopK(ratio=0.01), [10_000], 2, "one_phase"),
        (TopK(ratio=0.01), [10_000], 99, "one_phase"),  # 99 payloads of 800 bytes are below 80,000
        (TopK(ratio=0.01), [10_000], 101, "dense"),
        (TopK(ratio=1.0), [10_000], 2, "dense"),
        (Sign(256), [100_000], 2, "one_phase"),
        (Sign(256), [100_000], 3, "two_phase"),
        (Sign(256), [100_000], 64, "two_phase"),
        (Sign(256), [3], 2, "dense"),
        (Sign(256), [0], 2, "dense"),
        (Sign(256), [100_000, 3], 8, "two_phase"),
        (ChunkTopK(), [1_000_000], 2, "one_phase"),
        (ChunkTopK(), [1_000_000], 5, "one_phase"),  # 4 payloads against 4 / 5 of 1 + 4
        (ChunkTopK(), [1_000_000], 6, "two_phase"),
        (ChunkTopK(server_k=64), [1_000_000], 3, "two_phase"),
        (ChunkTopK(value_bits=2), [10], 4, "dense"),
        (RandomK(ratio=0.1, seed=0), [10_000], 2, "one_phase"),
        (RandomK(ratio=0.1, seed=0), [10_000], 8, "seeded"),
        (RandomK(ratio=0.4, seed=0), [10_000], 8, "seeded"),
        (RandomK(ratio=1.0, seed=0), [10_000], 8, "dense"),
    ],
)
def test_auto_chooses_least_bytes(compressor: Any, numels: list[int], world_size: int, expected: str) -> None:
    assert choose_algorithm(compressor, numels, world_size) == expected


@pytest.mark.parametrize(
    "compressor",
    [
        TopK(ratio=0.05),
        TopK(ratio=0.4),
        Sign(32),
        Sign(8192),
        ChunkTopK(8, 64),
        ChunkTopK(8, 64, server_k=8),
        Quantize(4, 64),
        RandomK(k=99, seed=0),
    ],
    ids=str,
)
def test_auto_sends_least_in_fact(compressor: Any) -> None:
    for world_size in (2, 3, 7):
        sent = {}
        for algorithm in ("auto", "one_phase", "two_phase", "dense"):
            if not runs_on(compressor, algorithm):
                continue
            group = SimulatedGroup(world_size, timeout=20)
            group.run(lambda m, a=algorithm: all_reduce_(
                torch.ones(4000), None, compressor, m, algorithm=a, validate="off"
            ))  # fmt: skip
            sent[algorithm] = group.bytes_sent[0]
        # The ring's bytes are rounded down.
        assert sent["auto"] <= min(sent.values()) + 1


@pytest.mark.parametrize("compressor", [Sign(), Quantize(bits=4)], ids=str)
def test_large_shards_that_end_within_a_chunk(compressor: Any) -> None:
    """Without residuals: an owner then has no gradient behind what it sums, and nothing may be read there."""
    grad = torch.randn(400_001, generator=torch.Generator().manual_seed(3))
    member, state = SimulatedGroup(1).members[0], ErrorFeedback()
    expected = all_reduce_(grad.clone(), state, compressor, member, algorithm="two_phase")
    for _ in range(5):
        found = all_reduce_(grad.clone(), None, compressor, member, algorithm="two_phase")
        assert torch.equal(found, expected)
