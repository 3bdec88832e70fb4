"""One rank of test_gpu.py. Ranks that share a GPU each claim to be a host of their own.

usage: gpu_worker DIRECTORY collectives | kill [own]; own: there is a GPU for each rank
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.nccl.one_device import environment

# What NCCL reads when it starts.
if __name__ == "__main__":
    os.environ |= ({} if sys.argv[3:] == ["own"] else environment(int(os.environ["RANK"]))) | {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_FILE": f"{sys.argv[1]}/nccl.{os.environ['RANK']}.log",
    }

import torch
import torch.distributed as dist

import gck
from gck.collectives import all_reduce_, sparse_all_gather
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveError, GroupUnusableError
from tests.collectives import launcher, scenarios
from tests.collectives.fault_worker import Deadly
from tests.kernels.test_gpu import synchronisation_is_an_error

KILL_TIMEOUT = 5.0
NUMEL = 100_003


def on_device(rank: int, group: Any, device: torch.device, in_flight: bool = False) -> dict[str, list[str]]:
    """Digests of what collectives of tensors on `device` leave behind; with `in_flight` asynchronous ones."""
    found = {}
    for compressor, algorithm in (
        (gck.TopK(ratio=0.01), "one_phase"),
        (gck.Sign(256), "two_phase"),
        (gck.ChunkTopK(k=16, chunk_size=1024, value_bits=8), "two_phase"),
    ):
        state, results, called = ErrorFeedback(), [], []
        for step in range(2):
            results.append(scenarios.gradient(rank, NUMEL, step=step).to(device))
            called.append(
                all_reduce_(results[-1], state, compressor, group, algorithm=algorithm, async_op=in_flight)
            )
        for work in called if in_flight else ():
            work.wait()
        residuals = [None if t is None else t.cpu() for t in (state.worker, state.server)]
        shared = [result.cpu() for result in results]
        found[f"{type(compressor).__name__} {algorithm}"] = [
            scenarios.digest(*shared),
            scenarios.digest(*residuals),
        ]
    payload = gck.topk(scenarios.gradient(rank, NUMEL).to(device), 0.01)
    gathered = sparse_all_gather(payload, group)
    found["gather"] = [scenarios.digest(*(t.cpu() for p in gathered for t in (p.values, p.indices)))]
    return found


def operations(comm: gck.NcclCommunicator) -> None:
    """Each operation once, with values that any order of additions gives exactly."""
    rank, size, device = comm.rank, comm.world_size, comm.device
    ranks = torch.arange(size, device=device)
    mine = torch.full((1000,), rank, device=device)
    assert torch.equal(comm.all_gather(mine), ranks[:, None].expand(size, 1000))
    rows = (100 * rank + ranks)[:, None].expand(size, 50).contiguous()
    assert torch.equal(comm.all_to_all(rows), (100 * ranks + rank)[:, None].expand(size, 50))
    sends = [(rank + s) % 3 for s in range(size)]
    uneven = comm.all_to_all(torch.full((sum(sends),), rank, device=device), sends, sends)
    assert uneven.tolist() == [r for r in range(size) for _ in range((r + rank) % 3)]
    total = torch.full((1000,), float(rank), device=device)
    comm.all_reduce(total)
    assert (total == sum(range(size))).all()
    assert (comm.reduce_scatter(rows, "max") == 100 * (size - 1) + rank).all()
    comm.broadcast(mine, root=size - 1)
    assert (mine == size - 1).all()
    ring = torch.zeros(3, dtype=torch.int64, device=device)
    with comm.group():
        comm.send(torch.full((3,), rank, device=device), (rank + 1) % size)
        comm.recv(ring, (rank - 1) % size)
    assert (ring == (rank - 1) % size).all()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        comm.all_reduce(total, "avg")
        comm.synchronize()
    assert (total == sum(range(size))).all()
    for stream in (side, side.cuda_stream):
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # cycles
        comm.all_reduce(total, "avg", stream=stream)
        rows = comm.all_gather(total, stream=stream)
        assert torch.cuda.current_stream().query()
        assert not side.query()
        comm.synchronize()
        assert (rows == sum(range(size))).all()
    torch.cuda._sleep(50_000_000)
    total.fill_(rank + 1)
    comm.all_reduce(total, stream=0)  # the default stream, which has been the current one
    comm.synchronize()
    assert (total == sum(range(1, size + 1))).all()
    comm.barrier()

    captured = torch.ones(1000, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(captured)
    for _ in range(3):
        graph.replay()
    comm.synchronize()
    assert (captured == size**3).all()


def both_in_flight(comm: gck.NcclCommunicator, other: gck.NcclCommunicator) -> None:
    """Operations of two communicators, each on a stream of its own; the same order on all ranks."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    totals = [torch.full((1 << 20,), float(comm.rank), device=comm.device) for _ in streams]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles; both are in their streams before either begins
    for one, stream, total in zip((comm, other), streams, totals, strict=True):
        one.all_reduce(total, stream=stream)
    assert not any(stream.query() for stream in streams)
    for one, total in zip((comm, other), totals, strict=True):
        one.synchronize()
        assert (total == sum(range(comm.world_size))).all()


def kept_until_used(comm: gck.NcclCommunicator) -> None:
    """What an operation on another stream has still to read goes to nobody else, though nobody holds it."""
    ranks = torch.arange(comm.world_size, device=comm.device)
    mine = torch.full((1 << 20,), comm.rank, device=comm.device)
    address, side = mine.data_ptr(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles
        gathered = comm.all_gather(mine)
    del mine
    others = [torch.full((1 << 20,), -1, device=comm.device) for _ in range(4)]
    assert address not in [other.data_ptr() for other in others]
    torch.cuda.synchronize()
    assert (gathered == ranks[:, None]).all()


def packed_on_another_stream(comm: gck.NcclCommunicator) -> None:
    """Fields that are no body yet are packed there, and may be freed at once."""
    side = torch.cuda.Stream()
    payload = gck.topk(scenarios.gradient(comm.rank, NUMEL).to(comm.device), 0.01)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles
    apart = payload._replace(values=payload.values.clone())
    side.wait_stream(torch.cuda.current_stream())
    gathered = comm.sparse_all_gather(apart, stream=side)
    del apart
    others = [torch.full_like(payload.values, -1) for _ in range(8)]
    comm.synchronize()
    assert others[0][0] == -1
    assert torch.equal(gathered[comm.rank].values, payload.values)


def without_a_wait(comm: gck.NcclCommunicator) -> None:
    """Between its messages the host waits for nothing; and a sparse all-gather is captured in a graph."""
    size, device = comm.world_size, comm.device
    payload = gck.topk(scenarios.gradient(comm.rank, NUMEL).to(device), 0.01)
    grad = scenarios.gradient(comm.rank, NUMEL).to(device)
    buffers = grad, torch.zeros_like(grad), torch.zeros(gck.shard_numel(NUMEL, 256, size), device=device)
    for _ in range(2):  # the first compiles
        with synchronisation_is_an_error():
            gathered = comm.sparse_all_gather(payload)
            gck.packed_all_reduce_(*buffers, 256, comm, validate="off")
    comm.synchronize()
    apart = comm.sparse_all_gather(payload._replace(values=payload.values.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = comm.sparse_all_gather(payload)
    payload.values.mul_(2)
    graph.replay()
    comm.synchronize()
    for rank in range(size):
        expected = gck.topk(scenarios.gradient(rank, NUMEL).to(device), 0.01)
        for found, factor in ((gathered[rank], 1), (apart[rank], 1), (captured[rank], 2)):
            assert torch.equal(found.values, factor * expected.values)
            assert torch.equal(found.indices, expected.indices)


def libraries() -> list[str]:
    maps = Path("/proc/self/maps").read_text()
    return sorted({line.split()[-1] for line in maps.splitlines() if "libnccl.so" in line})


def killed(comm: gck.NcclCommunicator) -> dict[str, Any]:
    """The last rank dies inside an all-reduce, between its phases."""
    grad, state = torch.ones(3 * 320_000, device=comm.device), ErrorFeedback()  # shards are whole
    state.worker_for(grad).fill_(3.0)
    all_reduce_(grad.clone(), ErrorFeedback(), gck.Sign(32), comm, algorithm="two_phase")
    comm.barrier()
    result: dict[str, Any] = {"error": "none"}
    began = time.monotonic()
    try:
        all_reduce_(grad, state, Deadly(2), comm, algorithm="two_phase")
    except CollectiveError as error:
        result = {"error": type(error).__name__, "text": str(error)}
    result["seconds"] = time.monotonic() - began
    assert state.worker is not None
    result["unchanged"] = bool((grad == 1).all() and (state.worker == 3).all())
    try:
        comm.barrier()
    except GroupUnusableError as error:
        result["after"] = str(error)
    return result


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=120)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if sys.argv[2] == "kill":
        with gck.NcclCommunicator.from_group(timeout=60) as comm:
            result = killed(comm.with_timeout(KILL_TIMEOUT))
    else:
        backend = dist.new_group(backend="nccl")
        dist.all_reduce(torch.ones(1, device=device), group=backend)
        with gck.NcclCommunicator.from_group(timeout=60) as comm, comm.split(0) as other:
            assert comm.device == device
            operations(comm)
            operations(other)
            both_in_flight(comm, other)
            kept_until_used(comm)
            packed_on_another_stream(comm)
            without_a_wait(comm)
            result = {
                "scenarios": scenarios.run(rank, world_size, comm),
                "on_device": on_device(rank, comm, device),
                "on_device_of_the_other": on_device(rank, other, device),
                "in_flight": on_device(rank, comm, device, in_flight=True),
                "libraries": libraries(),
            }
    launcher.report(directory, rank, result)
    launcher.leave()
