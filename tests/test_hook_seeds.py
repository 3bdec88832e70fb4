"""Seeds that a hook chooses for each step, where a compressor has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.compressor import compressor_of_step, server_of
from gck.errors import ArgumentError
from gck.integrations import ddp
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.test_ddp_by_name import Bucket, Model, hook

ROUNDED = gck.Quantize(bits=4, chunk_size=32, rounding="stochastic")
CHOSEN = gck.RandomK(ratio=0.2)
# What their seeds are said to be.
SEEDS: list[tuple[Any, Callable[[int, int], int]]] = [
    (CHOSEN, lambda step, rank: step),
    (ROUNDED, lambda step, rank: 2**40 * rank + step),
    (replace(CHOSEN, seed=9), lambda step, rank: 9),
    (replace(ROUNDED, seed=-9), lambda step, rank: -9),
]


@pytest.mark.parametrize(
    ("compressor", "seed"), SEEDS, ids=["random-k", "rounding", "given", "given-rounding"]
)
def test_each_step_is_that_of_its_seed(compressor: Any, seed: Callable[[int, int], int]) -> None:
    """By the bytes of results and of residuals; a state that was loaded goes on."""

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        state = ddp.HookState({"embed.*": compressor, "*": None}, model=model, group=member)
        own, bucket = gck.ErrorFeedback(), Bucket(model, member.rank)
        for step in range(4):
            if step == 2:
                saved = state.state_dict()
                state = ddp.HookState({"embed.*": compressor, "*": None}, model=model, group=member)
                state.load_state_dict(saved)
            bucket.flat.normal_(generator=torch.Generator().manual_seed(10 * step + member.rank))
            grad = bucket.gradients()["embed.weight"].clone()
            gck.all_reduce_(grad, own, replace(compressor, seed=seed(step, member.rank)), member)
            hook(state, bucket)
            assert same_bytes(bucket.gradients()["embed.weight"], grad), step
            left = state.residuals["embed.weight"]
            assert left.worker is not None
            assert own.worker is not None
            assert same_bytes(left.worker, own.worker)
        assert state.compressor["embed.*"] == compressor  # type: ignore[index]

    SimulatedGroup(3, timeout=20).run(rank_main)


def test_all_entries_are_sent_in_time() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        model = Model()
        state = ddp.HookState(gck.RandomK(ratio=0.5), model=model, group=member)
        bucket = Bucket(model, member.rank)
        total = torch.zeros_like(bucket.flat)
        for _ in range(40):
            hook(state, bucket)
            total += bucket.flat
            bucket.flat.zero_()
        assert not any(each.worker.any() for _, each in state.residuals.items() if each.worker is not None)
        return total

    expected = torch.stack([Bucket(Model(), rank).flat for rank in range(3)]).mean(0)
    for total in SimulatedGroup(3, timeout=20).run(rank_main):
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("compressor", [CHOSEN, ROUNDED], ids=str)
def test_who_counts_no_steps_does_not_choose(compressor: Any) -> None:
    """Nothing is changed, and the group stays usable."""
    member, state, grad = SimulatedGroup(1).members[0], gck.ErrorFeedback(), torch.ones(256)
    err, bodies = torch.ones(256), torch.zeros(1, compressor.layout(256).nbytes, dtype=torch.uint8)
    calls: list[Callable[[], object]] = [
        lambda: gck.all_reduce_(grad, state, compressor, member),
        lambda: compressor.compress_(grad, err, bodies),
    ]
    if compressor is ROUNDED:
        options = {"bits": 4, "rounding": "stochastic"}
        calls += [lambda: gck.quantize(grad, **options), lambda: gck.quantize_ef_(grad, err, **options)]
        calls += [lambda: compressor.reduce_(bodies, err, bodies[0].clone(), 256)]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"has no seed, and needs another one at every step"):
            call()
    assert torch.equal(grad, torch.ones(256))
    assert torch.equal(err, torch.ones(256))
    assert not bodies.any()
    assert state.worker is None
    gck.all_reduce_(grad, state, compressor_of_step(compressor, 0, 0), member)


def test_a_sum_is_rounded_by_other_bits_than_all_its_addends() -> None:
    addends = [compressor_of_step(ROUNDED, step, rank) for step in (0, 2**40 - 1) for rank in (0, 2**20)]
    seeds = {each.seed for one in addends for each in (one, server_of(one, 4))}  # type: ignore[attr-defined]
    assert len(seeds) == 2 * len(addends)


def test_rounding_to_nearest_needs_none() -> None:
    grad = torch.randn(256, generator=torch.Generator().manual_seed(0))
    assert gck.quantize(grad).codes.equal(gck.quantize(grad, seed=5).codes)
    assert compressor_of_step(gck.Quantize(), 3, 1).seed is None  # type: ignore[attr-defined]
    for made in (replace(gck.Quantize(4), rounding="stochastic"), ROUNDED):
        assert compressor_of_step(made, 3, 1).seed == 2**40 + 3  # type: ignore[attr-defined]


def test_only_what_says_so_lacks_a_seed() -> None:
    """A compressor of somebody else, whose None means something else."""

    @dataclass(frozen=True)
    class Theirs(Fragile):
        seed: int | None = None

    compressor, member = Theirs(gck.Sign(32), 0), SimulatedGroup(1).members[0]
    assert compressor_of_step(compressor, 3, 1) is compressor
    gck.all_reduce_(torch.ones(64), None, compressor, member, algorithm="one_phase")


def test_a_payload_of_random_k_is_not_decoded_without_its_seed() -> None:
    compressor, out = gck.RandomK(k=4), torch.ones(64)
    bodies = torch.zeros(2, compressor.layout(64).nbytes, dtype=torch.uint8)
    for decode in (
        lambda: compressor.decompress_(out, bodies[0]),
        lambda: compressor.decompress_sum_(out, bodies),
        lambda: compressor.decompress_mean_(out, bodies, 2),
    ):
        with pytest.raises(ArgumentError, match="has no seed"):
            decode()
    assert torch.equal(out, torch.ones(64))


def test_dense_messages_are_compared_once() -> None:
    """The seed is none of theirs."""

    def rank_main(member: SimulatedMember) -> list[int]:
        model = Model()
        options: dict[str, Any] = {"bypass_numel": 0, "bypass_1d": False, "model": model, "group": member}
        state = ddp.HookState({"head.*": CHOSEN, "*": None}, 2, **options)
        counts = []
        for _ in range(5):
            before = len(member._tickets)
            hook(state, Bucket(model, member.rank))
            counts.append(len(member._tickets) - before)
        return counts

    # Warm-up: a header and an all-reduce, then the latter. Then the same of both groups, one seeded.
    for counts in SimulatedGroup(2, timeout=20).run(rank_main):
        dense = counts[1]
        assert counts[0] == dense + 1
        assert counts[3] == counts[4] == counts[2] - 1


def test_ranks_that_join_take_the_step_of_the_others() -> None:
    def rank_main(member: SimulatedMember, saved: list[Any]) -> None:
        model = Model()
        state = ddp.HookState(CHOSEN, 1, model=model, group=member)
        if member.rank < 2:
            state.load_state_dict(saved[member.rank], reset_server=True)
        else:
            state.step = saved[0]["step"]
        hook(state, Bucket(model, member.rank))
        assert state.step == 4

    def before(member: SimulatedMember) -> Any:
        model = Model()
        state = ddp.HookState(CHOSEN, 1, model=model, group=member)
        for _ in range(3):
            hook(state, Bucket(model, member.rank))
        return state.state_dict()

    SimulatedGroup(3, timeout=20).run(rank_main, SimulatedGroup(2, timeout=20).run(before))
