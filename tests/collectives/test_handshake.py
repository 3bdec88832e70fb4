"""Ranks that disagree find out before they send a payload, all of them, and can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import (
    SimulatedGroup,
    SimulatedMember,
    all_reduce_,
    all_reduce_many_,
    handshake,
    packed_all_reduce_,
    sparse_all_gather,
)
from gck.collectives.handshake import HEADER
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError, CollectiveMismatchError
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK

Call = Callable[[SimulatedMember], Any]


def reduce(n: int = 600, compressor: Any = None, dtype: Any = None, **options: Any) -> Call:
    compressor = compressor or Sign(64)
    return lambda m: all_reduce_(torch.ones(n, dtype=dtype), ErrorFeedback(), compressor, m, **options)


def reduce_many(*numels: int) -> Call:
    return lambda m: all_reduce_many_([torch.ones(n) for n in numels], None, Sign(64), m)


def gather(payload: Any) -> Call:
    return lambda m: sparse_all_gather(payload, m)


def disagree(most: Call, odd: Call, odd_rank: int, world_size: int = 3) -> list[str]:
    """Every rank's error text; checks that the group works before and afterwards."""
    usual = reduce(n=64)

    def rank_main(member: SimulatedMember) -> str:
        first = usual(member)
        with pytest.raises(CollectiveMismatchError) as caught:
            (odd if member.rank == odd_rank else most)(member)
        for _ in range(2):
            again = usual(member)
            assert torch.equal(first, again)
        with pytest.raises(CollectiveMismatchError):
            (odd if member.rank == odd_rank else most)(member)
        return str(caught.value)

    return SimulatedGroup(world_size, timeout=20).run(rank_main)


@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize(
    ("most", "odd", "field"),
    [
        (reduce(), reduce(n=601), "numel (601, not 600)"),
        (reduce(n=700), reduce(n=700, compressor=Sign(128)), "compressor"),
        (reduce(compressor=TopK(ratio=0.1)), reduce(compressor=TopK(ratio=0.2)), "compressor"),
        (reduce(n=700), reduce(n=700, compressor=TopK(ratio=0.1)), "algorithm (one_phase, not two_phase)"),
        (reduce(), reduce(dtype=torch.bfloat16), "dtype (bfloat16, not float32)"),
        (reduce(), reduce(compressor=Sign(64, decay=0.9)), "compressor"),
        (reduce(), reduce(compressor=Sign(64, clip=1.0)), "compressor"),
        (reduce(), reduce(piece_numel=256), "compressor"),
        (reduce(piece_numel=256), reduce(piece_numel=128), "compressor"),
        (reduce(), reduce(op="sum"), "reduction (sum, not avg)"),
        (reduce(), reduce(algorithm="dense"), "algorithm (dense, not two_phase)"),
        (reduce_many(600, 700), reduce_many(700, 600), "shapes"),
        (reduce_many(600, 700), reduce_many(600, 300, 400), "tensors (3, not 2)"),
        (reduce(), gather(gck.topk(torch.ones(600), 0.1)), "algorithm (gather, not two_phase)"),
        (gather(gck.topk(torch.ones(600), 0.1)), gather(gck.topk(torch.ones(600), 0.2)), "numel"),
        (gather(gck.topk(torch.ones(600), k=9)), gather(gck.topk(torch.ones(601), k=9)), "compressor"),
    ],
)
def test_every_rank_names_rank_and_field(most: Call, odd: Call, field: str, odd_rank: int) -> None:
    texts = disagree(most, odd, odd_rank)
    assert len(texts) == 3
    for text in texts:
        assert f"rank {odd_rank} differs from most ranks in " in text
        assert field in text
        assert text.count("differs") == 1


def test_lost_count_is_a_mismatch_once() -> None:
    def rank_main(member: SimulatedMember) -> str:
        reduce()(member)
        if member.rank == 1:
            member.calls.sequence += 5
        with pytest.raises(
            CollectiveMismatchError, match=r"rank 1 differs .* sequence \(7, not 2\)"
        ) as caught:
            reduce(validate="always")(member)
        reduce(validate="always")(member)
        return str(caught.value)

    SimulatedGroup(3, timeout=20).run(rank_main)


@pytest.mark.parametrize(("validate", "headers"), [("off", 0), ("first", 2), ("always", 6)])
def test_headers_sent(validate: str, headers: int) -> None:
    """Three calls of each of two signatures."""

    def rank_main(member: SimulatedMember) -> None:
        for _ in range(3):
            for n in (600, 800):
                reduce(n, algorithm="dense", validate=validate)(member)

    group = SimulatedGroup(2, timeout=20)
    group.run(rank_main)
    assert HEADER.size == 64
    assert group.bytes_sent[0] - 3 * 4 * (600 + 800) == 64 * headers


def test_always_catches_what_first_cannot() -> None:
    """Both configurations are known to all ranks; then they are called in another order."""

    def rank_main(member: SimulatedMember) -> None:
        for n in (600, 800):
            reduce(n)(member)
        with pytest.raises(CollectiveMismatchError, match="numel"):
            reduce(600 if member.rank else 800, validate="always")(member)

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_mismatch_changes_nothing() -> None:
    def rank_main(member: SimulatedMember) -> None:
        grad, err = torch.randn(600), torch.randn(600)
        server = torch.randn(320 if member.rank == 0 else 384)
        before = [t.clone() for t in (grad, err, server)]
        with pytest.raises(CollectiveMismatchError):
            packed_all_reduce_(grad, err, server, 64 if member.rank == 0 else 128, member)
        after: list[Tensor] = [grad, err, server]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_unknown_validate() -> None:
    with pytest.raises(ArgumentError, match=r"validate must be .* got 'sometimes'"):
        SimulatedGroup(1).run(reduce(validate="sometimes"))


def test_the_seed_of_a_rounding_may_differ() -> None:
    """Between ranks, and from step to step, without a header being exchanged for each."""
    group = SimulatedGroup(3, timeout=20)

    def rank_main(member: SimulatedMember, step: int) -> Tensor:
        compressor = Quantize(4, 64, "stochastic", seed=3 * step + member.rank)
        reduced: Tensor = reduce(compressor=compressor, algorithm="two_phase")(member)
        return reduced

    sent = []
    for step in range(3):
        before = group.bytes_sent[0]
        results = group.run(rank_main, step)
        assert all(torch.equal(result, results[0]) for result in results)
        sent.append(group.bytes_sent[0] - before)
    assert sent[0] > sent[1] == sent[2]


def test_the_seed_of_a_choice_must_not_differ() -> None:
    """Values that do not say where they belong would be added up at different places."""
    group = SimulatedGroup(3, timeout=20)

    def rank_main(member: SimulatedMember) -> None:
        with pytest.raises(CollectiveMismatchError, match=r"rank 1 differs from most ranks in compressor"):
            reduce(compressor=RandomK(k=60, seed=member.rank % 2))(member)
        reduce(compressor=RandomK(k=60, seed=7))(member)

    group.run(rank_main)


def test_payloads_of_different_seeds_are_not_gathered() -> None:
    def rank_main(member: SimulatedMember) -> None:
        payload = gck.random_k(torch.ones(600), k=60, seed=member.rank)
        with pytest.raises(CollectiveMismatchError, match="compressor"):
            gck.sparse_all_gather(payload, member)

    SimulatedGroup(2, timeout=20).run(rank_main)


def test_what_ranks_have_agreed_on_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new seed at every step is a new signature; old ones are forgotten, on all ranks at once."""
    monkeypatch.setattr(handshake, "MOST_AGREED", 3)

    def rank_main(member: SimulatedMember) -> int:
        for step in range(8):
            reduce(600)(member)
            reduce(compressor=RandomK(k=60, seed=step))(member)
        return len(member.calls.agreed)

    kept = SimulatedGroup(2, timeout=20).run(rank_main)
    assert kept[0] == kept[1] <= 3
