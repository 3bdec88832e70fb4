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
from gck.errors import ArgumentError, CollectiveMismatchError, GckError
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


def test_ranks_that_count_each_other_differently() -> None:
    def rank_main(member: SimulatedMember) -> None:
        class Other(Damaged):
            world_size = 5

        transport = Other(member, 0, 0, -1) if member.rank == 2 else member
        signature = handshake.Signature("dense", "", (torch.float32,), (600,))
        with pytest.raises(CollectiveMismatchError, match=r"rank 2 .* in world_size \(5, not 3\)"):
            handshake.agree(transport, "test", signature)  # type: ignore[arg-type]
        reduce()(member)

    SimulatedGroup(3, timeout=20).run(rank_main)


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


class Damaged:
    """A transport that flips one bit of the header, or verdict, that this rank gets from another."""

    def __init__(self, inner: SimulatedMember, bit: int, sender: int, at: int) -> None:
        self.inner, self.bit, self.sender, self.at, self.count = inner, bit, sender, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def calls(self) -> Any:
        return self.inner.calls

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        rows = self.inner.all_gather_bytes(send)
        if self.count == self.at:
            rows[self.sender, self.bit // 8] ^= 1 << self.bit % 8
        self.count += 1
        return rows

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self.inner.all_to_all_bytes(send)


def damaged(member: SimulatedMember, bit: int, checksum: bool, odd: bool = False) -> str:
    """What one rank's call of three says where rank 2 gets a damaged header from rank 1."""
    transport = Damaged(member, bit, 1, 0 if member.rank == 2 else -1)
    grad, state = torch.randn(600), ErrorFeedback()
    before = grad.clone()
    try:
        all_reduce_(grad, state, Sign(64 if not odd else 128), transport, checksum=checksum)
    except GckError as error:
        assert torch.equal(grad, before)
        assert state.worker is None or not state.worker.any()
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("bit", [*range(0, 512, 23), 33, 511])
def test_a_flipped_bit_is_found_by_all_with_checksums(bit: int) -> None:
    def rank_main(member: SimulatedMember) -> str:
        text = damaged(member, bit, checksum=True)
        reduce(checksum=True)(member)  # the group is in step
        return text

    texts = SimulatedGroup(3, timeout=20).run(rank_main)
    assert texts[0] == texts[1] == texts[2]
    expected = "CorruptPayloadError: all_reduce_: handshake: the message from rank 1 to rank 2 was damaged"
    assert texts[0].startswith(expected)


@pytest.mark.parametrize("bit", [3, 33, 41, 100, 200, 300, 400, 511])
def test_a_flipped_bit_accuses_nobody_without_checksums(bit: int) -> None:
    """Its receiver alone knows; the others lose it."""

    def rank_main(member: SimulatedMember) -> list[str]:
        texts = [damaged(member, bit, checksum=False)]
        with pytest.raises(GckError) as caught:
            member.barrier()
        return [*texts, type(caught.value).__name__]

    outcomes = SimulatedGroup(3, timeout=20).run(rank_main)
    text, after = outcomes[2]
    assert text.startswith("CorruptPayloadError")
    assert "from rank 1 to rank 2 was damaged" in text
    assert "given up" in text
    assert after == "GroupUnusableError"
    for text, _ in outcomes[:2]:
        assert text.startswith("PeerLostError")


@pytest.mark.parametrize("checksum", [True, False])
def test_damage_beside_a_mismatch_is_no_hang(checksum: bool) -> None:
    """Rank 1 has another compressor, and its header does not reach rank 2 whole."""

    def rank_main(member: SimulatedMember) -> str:
        return damaged(member, 300, checksum, odd=member.rank == 1)

    texts = SimulatedGroup(3, timeout=20).run(rank_main)
    assert all("rank 1 differs from most ranks in compressor" in text for text in texts[:2])
    assert texts[2].startswith(("CorruptPayloadError", "PeerLostError", "CollectiveTimeoutError"))


def test_headers_of_the_first_version_had_no_seal() -> None:
    """They are of another version, not damaged."""

    class Old(Damaged):
        def all_gather_bytes(self, send: Tensor) -> Tensor:
            if self.count == 0:
                send = send.clone()
                send[4], send[-8:] = 1, 0
            self.count += 1
            return self.inner.all_gather_bytes(send)

    def rank_main(member: SimulatedMember) -> None:
        transport = Old(member, 0, 0, 0) if member.rank == 1 else member
        with pytest.raises(CollectiveMismatchError, match=r"rank 1 differs from most ranks in version \(1"):
            reduce()(transport)  # type: ignore[arg-type]

    SimulatedGroup(3, timeout=20).run(rank_main)


@pytest.mark.parametrize("checksum", [False, True])
def test_what_a_handshake_costs(checksum: bool) -> None:
    """A message of 64 bytes, and one of 16 with checksums; then nothing."""
    group = SimulatedGroup(3, timeout=20)

    def rank_main(member: SimulatedMember) -> None:
        signature = handshake.Signature("dense", "", (torch.float32,), (600,))
        for _ in range(2):
            handshake.agree(member, "test", signature, checksum=checksum)

    group.run(rank_main)
    assert group.bytes_sent == (2 * (64 + 16 * checksum),) * 3
