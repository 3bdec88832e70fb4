"""What a communicator does with tensors, over the fake library."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import Transport, resolve
from gck.errors import (
    ArgumentError,
    CollectiveError,
    DeviceMismatchError,
    DtypeError,
    GroupUnusableError,
    LayoutError,
    ShapeMismatchError,
)
from tests.nccl.ranks import on_threads, run_ranks

pytestmark = pytest.mark.usefixtures("fake")

DTYPES = [
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
]  # fmt: skip


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(*shape, generator=generator) * 5).to(dtype)


def expected(rows: list[Tensor], op: str) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        if op in ("max", "min"):
            total = torch.maximum(total, row) if op == "max" else torch.minimum(total, row)
        else:
            total = total * row if op == "prod" else total + row
    return total / len(rows) if op == "avg" else total


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_moves_bytes(world_size: int) -> None:
    def rank_main(comm: gck.NcclCommunicator) -> dict[str, Any]:
        rank, size = comm.rank, comm.world_size
        swapped = comm.all_to_all(torch.arange(4 * size).view(size, 4) + 100 * rank)
        # Rank r sends (r + s) % 3 elements to rank s: some of them none.
        sends, recvs = [(rank + s) % 3 for s in range(size)], [(s + rank) % 3 for s in range(size)]
        uneven = comm.all_to_all(torch.full((sum(sends),), rank), sends, recvs)
        root = torch.full((3,), rank)
        comm.broadcast(root, root=size - 1)
        fields = comm.all_gather_many([torch.tensor([rank, 7]), torch.tensor(0.5 + rank), torch.ones(0)])
        ring = torch.zeros(2, dtype=torch.int64)
        with comm.group():
            comm.send(torch.tensor([rank, rank]), (rank + 1) % size)
            comm.recv(ring, (rank - 1) % size)
        comm.barrier()
        return {
            "gathered": comm.all_gather(torch.tensor([[rank], [9]], dtype=torch.uint8)).tolist(),
            "swapped": swapped.tolist(),
            "uneven": uneven.tolist(),
            "root": root.tolist(),
            "fields": [field.tolist() for field in fields],
            "ring": ring.tolist(),
        }

    for rank, result in enumerate(run_ranks(world_size, rank_main)):
        ranks = range(world_size)
        assert result["gathered"] == [[[r], [9]] for r in ranks]
        assert result["swapped"] == [[100 * r + 4 * rank + i for i in range(4)] for r in ranks]
        assert result["uneven"] == [r for r in ranks for _ in range((r + rank) % 3)]
        assert result["root"] == [world_size - 1] * 3
        assert result["fields"] == [[[r, 7] for r in ranks], [0.5 + r for r in ranks], [[] for _ in ranks]]
        assert result["ring"] == [(rank - 1) % world_size] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    ops = ("sum", "prod", "max", "min", "avg") if dtype.is_floating_point else ("sum", "prod", "max", "min")

    def rank_main(comm: gck.NcclCommunicator) -> list[tuple[str, Tensor, Tensor]]:
        results = []
        for op in ops:
            whole = values(comm.rank, 31, dtype=dtype)
            comm.all_reduce(whole, op)
            part = comm.reduce_scatter(values(comm.rank, 3, 7, dtype=dtype), op)
            results.append((op, whole, part))
        return results

    for rank, results in enumerate(run_ranks(3, rank_main)):
        for op, whole, part in results:
            assert torch.equal(whole, expected([values(r, 31, dtype=dtype) for r in range(3)], op)), op
            rows = [values(r, 3, 7, dtype=dtype)[rank] for r in range(3)]
            assert torch.equal(part, expected(rows, op)), op


def test_large_messages_and_many_operations() -> None:
    def rank_main(comm: gck.NcclCommunicator) -> bool:
        large = values(comm.rank, 3_000_000)
        comm.all_reduce(large)
        for step in range(300):
            small = torch.tensor([comm.rank + step])
            comm.all_reduce(small)
            assert small.item() == 2 * step + 1
        return torch.equal(large, values(0, 3_000_000) + values(1, 3_000_000))

    assert run_ranks(2, rank_main) == [True, True]


def test_groups_start_together() -> None:
    """Without a group these sends would wait for receives that come after them."""

    def rank_main(comm: gck.NcclCommunicator) -> list[int]:
        others = [r for r in range(comm.world_size) if r != comm.rank]
        received = {r: torch.zeros(70_000, dtype=torch.int64) for r in others}
        total = torch.tensor([comm.rank])
        with comm.group():
            for r in others:
                comm.send(torch.full((70_000,), comm.rank), r)
            for r in others:
                comm.recv(received[r], r)
            comm.all_reduce(total)
            with pytest.raises(ArgumentError, match="split: not while a group is open"):
                comm.split(0)
        assert all((tensor == r).all() for r, tensor in received.items())
        return total.tolist()

    assert run_ranks(3, rank_main) == [[3]] * 3


def test_split() -> None:
    def rank_main(comm: gck.NcclCommunicator) -> Any:
        none = comm.split(None)
        halves = comm.split(comm.rank % 2, key=-comm.rank)
        assert none is None
        assert halves is not None
        with halves:
            gathered = halves.all_gather(torch.tensor([comm.rank])).view(-1).tolist()
            inner = halves.split(0)
            assert inner is not None
            inner.close()
        comm.barrier()  # the parent goes on
        return halves.rank, gathered

    results = run_ranks(5, rank_main)
    assert results == [(2, [4, 2, 0]), (1, [3, 1]), (1, [4, 2, 0]), (0, [3, 1]), (0, [4, 2, 0])]


def test_arrays_of_others() -> None:
    """Written where they lie."""
    numpy = pytest.importorskip("numpy")

    def rank_main(comm: gck.NcclCommunicator) -> None:
        array = numpy.full(5, comm.rank + 1, dtype=numpy.float32)
        comm.all_reduce(array)
        assert array.tolist() == [3.0] * 5
        fixed = numpy.arange(2) + comm.rank
        fixed.flags.writeable = False
        assert comm.all_gather(fixed).tolist() == [[0, 1], [1, 2]]
        with pytest.raises(LayoutError, match="broadcast: tensor is a read-only array"):
            comm.broadcast(fixed)
        with comm.group():
            comm.send(array * 2, 1 - comm.rank)
            comm.recv(array, 1 - comm.rank)
        assert array.tolist() == [6.0] * 5

    run_ranks(2, rank_main)


def test_is_a_transport() -> None:
    def rank_main(comm: gck.NcclCommunicator) -> None:
        assert isinstance(comm, Transport)
        assert resolve(comm) is comm
        other = resolve(comm, timeout=3)
        assert (other.timeout, comm.timeout) == (3, 20)
        assert other.calls is comm.calls
        assert comm.device == torch.device("cpu")
        assert repr(comm) == f"<NcclCommunicator rank {comm.rank} of 2 on cpu>"
        other.barrier()
        comm.synchronize()

    run_ranks(2, rank_main)


def test_two_communicators_at_once() -> None:
    first_id, second_id = (gck.NcclCommunicator.create_unique_id() for _ in range(2))

    def rank_main(rank: int) -> list[float]:
        with (
            gck.NcclCommunicator(first_id, rank, 2, timeout=20) as first,
            gck.NcclCommunicator(second_id, 1 - rank, 2, timeout=20) as second,
        ):
            a, b = torch.tensor([1.0 + rank]), torch.tensor([10.0 * (1 + rank)])
            first.all_reduce(a)
            second.all_reduce(b)
            return [a.item(), b.item(), float(second.rank)]

    assert on_threads(2, rank_main) == [[3.0, 30.0, 1.0], [3.0, 30.0, 0.0]]


def test_threads_of_one_rank_take_turns() -> None:
    def rank_main(comm: gck.NcclCommunicator) -> None:
        errors: list[BaseException] = []

        def use() -> None:
            try:
                for _ in range(50):
                    tensor = torch.ones(10)
                    comm.all_reduce(tensor)
                    assert (tensor == 2).all()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    run_ranks(2, rank_main)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: c.all_gather([1]), DtypeError, r"must be a tensor or an array .*, got \[1\] \(list\)"),
        (lambda c: c.all_gather(torch.ones(2).bool()), DtypeError, "a dtype that NCCL has, got torch.bool"),
        (lambda c: c.all_reduce(torch.ones(2, 3).t()), LayoutError, "all_reduce: tensor must be contiguous"),
        (lambda c: c.all_gather(torch.ones(2, device="meta")), DeviceMismatchError, "device cpu, got meta"),
        (lambda c: c.all_reduce(torch.ones(2), "mean"), ArgumentError, "op must be one of .*, got 'mean'"),
        (lambda c: c.reduce_scatter(torch.ones(2)), ShapeMismatchError, r"send must have 1 rows, got \(2,\)"),
        (lambda c: c.all_to_all(torch.ones(2)), ShapeMismatchError, r"send must have 1 rows, got \(2,\)"),
        (lambda c: c.all_to_all(torch.ones(2), [2]), ArgumentError, "must both be given"),
        (lambda c: c.all_to_all(torch.ones(2), [3], [3]), ShapeMismatchError, "add up to 3, send has 2"),
        (
            lambda c: c.all_to_all(torch.ones(2), [-2], [2]),
            ArgumentError,
            r"must be 1 ints .*\[-2\]",
        ),
        (lambda c: c.broadcast(torch.ones(2), 1), ArgumentError, r"root must be a rank in \[0, 1\), got 1"),
        (lambda c: c.send(torch.ones(2), -1), ArgumentError, "peer must be a rank"),
        (lambda c: c.recv(torch.ones(2), True), ArgumentError, "peer must be a rank"),
        (lambda c: c.split(-1), ArgumentError, "color must be None or an int of at least 0, got -1"),
        (lambda c: c.with_timeout(0), ArgumentError, "timeout must be a positive number"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], text: str) -> None:
    with gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=20) as comm:
        with pytest.raises(error, match=text):
            call(comm)
        comm.barrier()  # nothing has happened to it


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((b"short", 0, 1), "unique_id must be 128 bytes, got bytes of 5"),
        (("x" * 128, 0, 1), "unique_id must be 128 bytes, got str"),
        ((0, 1, bytes(128)), "unique_id must be 128 bytes, got int"),
        ((bytes(128), 2, 2), r"rank must be an int in \[0, 2\), got 2"),
        ((bytes(128), 0, 0), "world_size must be a positive int, got 0"),
    ],
)
def test_wrong_identities(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        gck.NcclCommunicator(*arguments)


def test_an_id_that_is_none() -> None:
    with pytest.raises(CollectiveError, match=r"init on rank 0 of 1: failed.*invalid argument") as raised:
        gck.NcclCommunicator(b"s3cret" + os.urandom(122), 0, 1)
    assert "s3cret" not in str(raised.value)


def test_closing() -> None:
    comm = gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=20)
    comm.close()
    comm.close()
    comm.abort("too late")
    for call in (
        comm.barrier,
        comm.synchronize,
        lambda: comm.split(0),
        lambda: comm.all_gather(torch.ones(1)),
    ):
        with pytest.raises(GroupUnusableError, match="it was closed"):
            call()
    assert "unusable: it was closed" in repr(comm)
