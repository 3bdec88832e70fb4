"""What reaches the library: one launch for each exchange of bytes, whatever a payload is made of."""

from __future__ import annotations

import ctypes
import threading
from typing import Any, NamedTuple

import pytest
import torch

import gck
from gck.collectives import SimulatedGroup, packed_all_reduce_, sparse_all_gather, two_phase
from gck.collectives.transports.nccl_operations import orphans
from gck.compressor import shard_numel
from gck.errors import ArgumentError, CollectiveError, GroupUnusableError, LayoutError, PeerLostError
from gck.payload import SparseGrad
from tests.cases import same_bytes
from tests.collectives.scenarios import gradient
from tests.nccl.library import fake_library
from tests.nccl.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fake")


class Counts(NamedTuple):
    """Calls of this process, all ranks together."""

    launches: int
    sends: int
    gathers: int

    @classmethod
    def now(cls) -> Counts:
        found = (ctypes.c_int * 3)()
        ctypes.CDLL(str(fake_library())).fakeNcclCounts(found)
        return cls(*found)

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def payload_of(rank: int, apart: bool) -> SparseGrad:
    """Three ranks' payloads of one layout; `apart` in tensors of their own, with room for padding."""
    payload = gck.topk(gradient(rank, 500), k=33)
    if not apart:
        return payload
    return SparseGrad(payload.values.clone(), payload.indices.clone(), payload.numel)


def counted(world_size: int, rank_main: Any) -> tuple[list[Any], Counts]:
    """What ranks return, and calls within `rank_main`, of which barriers are none."""
    before = Counts.now()
    results = run_ranks(world_size, rank_main)
    return results, Counts.now().since(before)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_sparse_all_gather_is_one_launch(world_size: int) -> None:
    """Also where the payloads of some ranks are one body, and those of others are not."""

    def rank_main(comm: Any) -> list[SparseGrad]:
        return sparse_all_gather(payload_of(comm.rank, apart=comm.rank != 1), comm, validate="off")

    found, counts = counted(world_size, rank_main)
    assert counts == Counts(launches=world_size, sends=0, gathers=world_size)
    for ours, theirs in zip(found, SimulatedGroup(world_size).run(rank_main), strict=True):
        for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert same_bytes(a.values, b.values)
            assert same_bytes(a.indices, b.indices)
            assert same_bytes(a.values, payload_of(rank, apart=False).values)
        # Rows of one buffer: their sum is taken without a copy.
        assert len({payload.values.untyped_storage().data_ptr() for payload in ours}) == 1


def test_without_a_wait() -> None:
    def rank_main(comm: Any) -> list[SparseGrad]:
        comm.synchronize = None  # must not be called
        gathered = comm.sparse_all_gather(payload_of(comm.rank, apart=comm.rank == 1))
        del comm.synchronize
        empty = comm.sparse_all_gather(SparseGrad(torch.ones(0), torch.ones(0, dtype=torch.int32), 9))
        assert [(len(payload.values), payload.numel) for payload in empty] == [(0, 9)] * 3
        for wrong, error in (
            ([torch.ones(2)], ArgumentError),
            ((3,), ArgumentError),
            ((torch.ones(2, 2).t(),), LayoutError),
        ):
            with pytest.raises(error, match="sparse_all_gather: "):
                comm.sparse_all_gather(wrong)
        return gathered

    found, counts = counted(3, rank_main)
    assert counts == Counts(launches=3, sends=0, gathers=3)
    for ours in found:
        for rank, payload in enumerate(ours):
            expected = payload_of(rank, apart=False)
            assert same_bytes(payload.values, expected.values)
            assert same_bytes(payload.indices, expected.indices)


@pytest.mark.parametrize("numel", [1, 1001])
def test_a_packed_all_reduce_is_two_launches(numel: int) -> None:
    """A send to each rank, this one too, in one; and an all-gather."""

    def rank_main(comm: Any) -> list[torch.Tensor]:
        grad, err = gradient(comm.rank, numel), gradient(comm.rank, numel, step=1)
        server = torch.zeros(shard_numel(numel, 64, 3))
        packed_all_reduce_(grad, err, server, 64, comm, validate="off")
        return [grad, err, server]

    found, counts = counted(3, rank_main)
    assert counts == Counts(launches=2 * 3, sends=3 * 3, gathers=3)
    for ours, theirs in zip(found, SimulatedGroup(3).run(rank_main), strict=True):
        assert all(same_bytes(a, b) for a, b in zip(ours, theirs, strict=True))


def operations_of(comm: Any) -> list[str]:
    """What is asked of the native communicator from now on."""
    asked: list[str] = []
    run = comm._run

    def noted(operation: str, *arguments: Any) -> None:
        asked.append(operation)
        run(operation, *arguments)

    comm._run = noted
    return asked


@pytest.mark.parametrize("piece_numel", [None, 320])
def test_both_phases_are_one_call(piece_numel: int | None) -> None:
    """Into C++, of each piece; with the bytes that two calls give."""

    def rank_main(comm: Any) -> tuple[list[torch.Tensor], list[str]]:
        asked = operations_of(comm) if isinstance(comm, gck.NcclCommunicator) else []
        grad, state = gradient(comm.rank, 1001), gck.ErrorFeedback()
        gck.all_reduce_(
            grad,
            state,
            gck.ChunkTopK(k=4, chunk_size=32, value_bits=2),
            comm,
            algorithm="two_phase",
            piece_numel=piece_numel,
            validate="off",
        )
        assert state.worker is not None
        assert state.server is not None
        return [grad, state.worker, state.server], asked

    for (ours, asked), (theirs, _) in zip(
        run_ranks(3, rank_main), SimulatedGroup(3).run(rank_main), strict=True
    ):
        assert asked == ["packed_all_reduce"] * (1 if piece_numel is None else 3)
        assert all(same_bytes(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("generic", [False, True])
def test_an_owner_that_cannot_reduce(generic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Python's between the launches comes through C++ as it is. Peers hear of it at once, and
    what this rank would send next is not taken for what they wait for."""

    def full(*arguments: Any, **options: Any) -> None:
        if threading.current_thread() is short:
            raise MemoryError("no room for a sum")
        reduce(*arguments, **options)

    def rank_main(comm: Any) -> str:
        nonlocal short
        if comm.rank == 1:
            short = threading.current_thread()
        comm.barrier()
        buffers = gradient(comm.rank, 900), gradient(comm.rank, 900, step=1), torch.ones(512)
        before = [buffer.clone() for buffer in buffers]
        with pytest.raises((MemoryError, PeerLostError)) as caught:
            packed_all_reduce_(*buffers, 64, comm, validate="off")
        if comm.rank == 0:
            heard.set()
        else:
            assert heard.wait(10), "the peer still waits"
        assert all(same_bytes(a, b) for a, b in zip(buffers, before, strict=True))
        with pytest.raises(GroupUnusableError):
            packed_all_reduce_(*buffers, 64, comm, validate="off")
        return f"{caught.type.__name__}: {caught.value}"

    short: threading.Thread | None = None
    heard = threading.Event()
    reduce = two_phase.reduce_
    monkeypatch.setattr(two_phase, "reduce_", full)
    if generic:
        monkeypatch.setattr(two_phase, "in_one_call", lambda *arguments: False)
    texts = run_ranks(2, rank_main, timeout=30)
    assert texts[1] == "MemoryError: no room for a sum"
    assert texts[0].startswith("PeerLostError: "), texts


def test_nothing_can_be_reduced_within_a_group() -> None:
    with gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=20) as comm:
        send = torch.ones(1, 8, dtype=torch.uint8)
        with pytest.raises(ArgumentError, match="packed_all_reduce: a group is open"), comm.group():
            comm.reduce_bytes(send, lambda rows: rows[0])


@pytest.mark.parametrize("stream", [0, 12345, object()])
def test_streams_are_of_devices(stream: object) -> None:
    with gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=20) as comm:
        mine = torch.ones(1, 2)
        for name, call in {
            "all_gather": lambda: comm.all_gather(mine, stream=stream),
            "all_to_all": lambda: comm.all_to_all(mine, stream=stream),
            "reduce_scatter": lambda: comm.reduce_scatter(mine, stream=stream),
            "broadcast": lambda: comm.broadcast(mine, stream=stream),
            "send": lambda: comm.send(mine, 0, stream=stream),
            "recv": lambda: comm.recv(mine, 0, stream=stream),
            "all_reduce": lambda: comm.all_reduce(mine, stream=stream),
            "sparse_all_gather": lambda: comm.sparse_all_gather((mine.view(-1),), stream=stream),
        }.items():
            with pytest.raises(ArgumentError, match=f"{name}: stream must be None where ranks exchange host"):
                call()
        assert comm.all_gather(mine, stream=None).tolist() == [[[1, 1]]]


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ("REMOTE_ERROR_AT", 1),
        ("REMOTE_ERROR_AT", 2),
        ("ERROR_AFTER", 1),
        ("HANG_AT", 2),
        ("CALL_FAILS_AT", 2),  # a receive
        ("CALL_FAILS_AT", 5),  # the all-gather
    ],
)
def test_a_launch_that_fails(fault: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed all-reduce the first or the second: nothing changes, and the group says why it is over."""
    monkeypatch.setenv(f"FAKE_NCCL_{fault}", str(at))
    monkeypatch.setenv("FAKE_NCCL_RANK", "1")
    timeout = 1.0 if fault == "HANG_AT" else 20.0

    def rank_main(comm: Any) -> str:
        comm = comm.with_timeout(timeout)
        buffers = gradient(comm.rank, 900), gradient(comm.rank, 900, step=1), torch.ones(512)
        before = [buffer.clone() for buffer in buffers]
        try:
            packed_all_reduce_(*buffers, 64, comm, validate="off")
        except CollectiveError as error:
            text = f"{type(error).__name__}: {error}"
        else:
            return "no error"
        with pytest.raises(GroupUnusableError, match="the group cannot be used any more"):
            comm.sparse_all_gather(payload_of(0, apart=True))
        assert all(same_bytes(a, b) for a, b in zip(buffers, before, strict=True))
        # The library's group is closed: else nothing of this thread's would start any more.
        with gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=20) as alone:
            assert alone.all_gather(torch.ones(2)).tolist() == [[1, 1]]
        return text

    texts = run_ranks(2, rank_main)
    if fault == "CALL_FAILS_AT":
        assert texts[1].startswith("CollectiveError: "), texts[1]
        assert "injected: a call within a group" in texts[1]
    for text in texts[:1] if fault == "CALL_FAILS_AT" else texts:
        assert text.startswith(("PeerLostError: ", "CollectiveTimeoutError: ")), text
    assert len(orphans) == 0
