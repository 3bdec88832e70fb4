"""sparse_all_gather: everybody's payload, in rank order, byte for byte."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup, SimulatedMember, all_gather, sparse_all_gather
from gck.errors import ArgumentError, GroupUnusableError, LayoutError
from tests.cases import same_bytes


class Strange(NamedTuple):
    """A payload that gck does not know."""

    scale: float
    codes: Tensor
    note: str
    table: Tensor


def strange(rank: int) -> Strange:
    return Strange(0.5, torch.arange(7, dtype=torch.uint8) + rank, "x", torch.full((3,), rank).double())


def sparse(rank: int) -> Any:
    return gck.topk(torch.randn(300, generator=torch.Generator().manual_seed(rank)), 0.1)


def by_hand(rank: int) -> Any:
    """Tensors that are no views of one body."""
    payload = sparse(rank)
    return type(payload)(payload.values.clone(), payload.indices.clone(), payload.numel)


def signs(rank: int) -> Any:
    grad = torch.randn(301, generator=torch.Generator().manual_seed(rank))
    return gck.sign_ef_(grad, torch.zeros(301), chunk_size=64)


def empty(rank: int) -> Any:
    return gck.topk(torch.zeros(0), 0.1)


@pytest.mark.parametrize("make", [strange, sparse, by_hand, signs, empty])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_payload_in_rank_order(make: Any, world_size: int) -> None:
    group = SimulatedGroup(world_size, timeout=20)

    def rank_main(member: SimulatedMember) -> list[Any]:
        return sparse_all_gather(make(member.rank), member, validate="off")

    for gathered in group.run(rank_main):
        assert len(gathered) == world_size
        for rank, payload in enumerate(gathered):
            assert type(payload) is type(make(rank))
            for got, expected in zip(payload, make(rank), strict=True):
                assert same_bytes(got, expected) if isinstance(got, Tensor) else got == expected
    if make is not strange:
        assert group.bytes_sent[0] == (world_size - 1) * make(0).nbytes


def test_gathered_payloads_decode() -> None:
    def rank_main(member: SimulatedMember) -> Tensor:
        return sum(gck.decompress(p) for p in sparse_all_gather(signs(member.rank), member))

    expected = sum(gck.decompress(signs(rank)) for rank in range(3))
    for total in SimulatedGroup(3, timeout=20).run(rank_main):
        assert same_bytes(total, expected)


@pytest.mark.parametrize(
    ("payload", "error", "text"),
    [
        (
            torch.ones(3),
            ArgumentError,
            r"payload must be a payload NamedTuple, got a tensor of shape \(3,\), torch.float32, cpu",
        ),
        ((torch.ones(3),), ArgumentError, r"got \(<Tensor of shape \(3,\)>,\) \(tuple\)"),
        (
            Strange(1.0, None, "", None),
            ArgumentError,
            r"Strange holds no tensors, got Strange\(.*\) \(Strange\)",
        ),  # type: ignore[arg-type]
        (strange(0)._replace(table=torch.ones(4, 4).t()), LayoutError, "table must be contiguous"),
    ],
)
def test_wrong_payloads(payload: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SimulatedGroup(1).run(lambda member: sparse_all_gather(payload, member))


def test_interrupt_between_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that wait must not get this rank's next payload in place of the one that never came."""
    group = SimulatedGroup(2, timeout=20)

    def interrupted(*tensors: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(all_gather, "body_of", interrupted)

    def rank_main(member: SimulatedMember) -> None:
        with pytest.raises(KeyboardInterrupt):
            sparse_all_gather(sparse(member.rank), member)
        with pytest.raises(GroupUnusableError, match="KeyboardInterrupt in sparse_all_gather"):
            member.barrier()

    group.run(rank_main)


def test_wrong_group() -> None:
    with pytest.raises(ArgumentError, match=r"group must be None, .* got 'world' \(str\)"):
        sparse_all_gather(sparse(0), "world")
    with pytest.raises(ArgumentError, match=r"got <SimulatedGroup object> \(SimulatedGroup\)"):
        sparse_all_gather(sparse(0), SimulatedGroup(2))
    with pytest.raises(ArgumentError, match="init_process_group"):
        sparse_all_gather(sparse(0))
    with pytest.raises(ArgumentError, match="timeout must be a positive number of seconds, got -1"):
        SimulatedGroup(1).run(lambda member: sparse_all_gather(sparse(0), member, timeout=-1))
