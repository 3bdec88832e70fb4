"""Who does the tasks: gck, PyTorch and CuPy, each on a communicator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gck
from bench.nccl.tasks import CHUNK, Dense, Packed, Sparse
from gck.compressor import reduce_

__all__ = ["Absent", "Method", "methods"]

Method = Callable[[Any], Any]  # a task in, what its `verify` takes out
TIMEOUT = 120.0
# Renamed in newer versions, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Absent(Exception):  # noqa: N818  # no error: it stands in the report
    """Why a peer takes no part."""


def methods(rank: int, world_size: int, device: torch.device) -> tuple[dict[str, dict[str, Method]], Any]:
    """By task and name; and by name of an absent peer, why it is. The same on all ranks, who all call it."""
    found: dict[str, dict[str, Method]] = {}
    absent: dict[str, str] = {}
    for name, make in (("gck", _gck), ("torch.distributed", _torch), ("cupy.cuda.nccl", _cupy)):
        made, reason = None, None
        try:
            made = make(rank, world_size, device)
        except Absent as error:
            reason = str(error)
        except Exception as error:
            if name == "gck":
                raise
            reason = f"{type(error).__name__}: {error}"
        reasons: list[Any] = [None] * world_size
        dist.all_gather_object(reasons, reason)
        first = next((text for text in reasons if text is not None), None)
        if first is not None:
            absent[name] = first.strip().partition("\n")[0]
        for task, method, call in made if made is not None and first is None else ():
            found.setdefault(task, {})[method] = call
    return found, absent


def _gck(rank: int, world_size: int, device: torch.device) -> list[tuple[str, str, Method]]:
    comm = gck.NcclCommunicator.from_group(timeout=TIMEOUT, device=device if device.type == "cuda" else None)
    if comm.device != device:
        raise gck.errors.BackendUnavailableError(f"the library works on {comm.device}, not on {device}")

    def dense(task: Dense) -> Tensor:
        comm.all_reduce(task.vector)
        return task.vector

    def without_a_wait(task: Sparse) -> list[tuple[Tensor, Tensor]]:
        return [(p.values, p.indices) for p in comm.sparse_all_gather(task.payload)]

    return [
        ("sparse all-gather", "gck", _sparse_over(comm)),
        ("sparse all-gather", "gck, without a wait", without_a_wait),
        ("packed all-reduce", "gck", _packed_over(comm)),
        ("all-reduce", "gck", dense),
    ]


def _sparse_over(group: Any) -> Method:
    def sparse(task: Sparse) -> list[tuple[Tensor, Tensor]]:
        return [(p.values, p.indices) for p in gck.sparse_all_gather(task.payload, group)]

    return sparse


def _packed_over(group: Any) -> Method:
    def packed(task: Packed) -> Tensor:
        return gck.packed_all_reduce_(task.grad, task.err, task.server_err, CHUNK, group)

    return packed


def _torch(rank: int, world_size: int, device: torch.device) -> list[tuple[str, str, Method]]:
    if device.type != "cuda":
        raise Absent("there is no CUDA device")
    if not dist.is_nccl_available():
        raise Absent("this torch was built without NCCL")
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=TIMEOUT))
    dist.all_reduce(torch.ones(1, device=device), group=group)
    torch.cuda.synchronize()

    def gather(send: Tensor) -> Tensor:
        recv = send.new_empty(world_size * send.numel())
        _all_gather(recv, send, group=group)
        return recv.view(world_size, -1)

    def exchange(send: Tensor) -> Tensor:
        recv = torch.empty_like(send)
        dist.all_to_all_single(recv, send, group=group)
        return recv

    def sparse(task: Sparse) -> list[tuple[Tensor, Tensor]]:
        return list(zip(gather(task.payload.values), gather(task.payload.indices), strict=True))

    def dense(task: Dense) -> Tensor:
        dist.all_reduce(task.vector, group=group)
        return task.vector

    return [
        ("sparse all-gather", "torch.distributed", sparse),
        ("sparse all-gather", "gck over torch.distributed", _sparse_over(group)),
        (
            "packed all-reduce",
            "torch.distributed, gck's kernels",
            _composed(rank, world_size, exchange, gather),
        ),
        ("packed all-reduce", "gck over torch.distributed", _packed_over(group)),
        ("all-reduce", "torch.distributed", dense),
    ]


def _cupy(rank: int, world_size: int, device: torch.device) -> list[tuple[str, str, Method]]:
    if device.type != "cuda":
        raise Absent("there is no CUDA device")
    # Ranks must agree before they meet: one that lacks CuPy would leave the others waiting.
    nccl: Any = None
    reason = None
    try:
        nccl = import_module("cupy.cuda.nccl")  # which CuPy 14 no longer imports by itself
        nccl.get_version()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    reasons: list[Any] = [None] * world_size
    dist.all_gather_object(reasons, reason)
    for text in reasons:
        if text is not None:
            raise Absent(text)
    card = [nccl.get_unique_id() if rank == 0 else None]
    dist.broadcast_object_list(card, src=0)
    comm = nccl.NcclCommunicator(world_size, card[0], rank)

    @contextmanager
    def group() -> Iterator[int]:
        nccl.groupStart()
        try:
            yield torch.cuda.current_stream().cuda_stream
        finally:
            nccl.groupEnd()

    def gather(*sends: Tensor) -> list[Tensor]:
        recvs = [send.new_empty(world_size, send.numel()) for send in sends]
        with group() as stream:
            for send, recv in zip(sends, recvs, strict=True):
                comm.allGather(send.data_ptr(), recv.data_ptr(), send.nbytes, nccl.NCCL_UINT8, stream)
        return recvs

    def exchange(send: Tensor) -> Tensor:
        recv = torch.empty_like(send)
        with group() as stream:
            for peer in range(world_size):
                source, target = send[peer], recv[peer]
                comm.send(source.data_ptr(), source.nbytes, nccl.NCCL_UINT8, peer, stream)
                comm.recv(target.data_ptr(), target.nbytes, nccl.NCCL_UINT8, peer, stream)
        return recv

    def sparse(task: Sparse) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*gather(task.payload.values, task.payload.indices), strict=True))

    def dense(task: Dense) -> Tensor:
        address, stream = task.vector.data_ptr(), torch.cuda.current_stream().cuda_stream
        comm.allReduce(address, address, task.count, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
        return task.vector

    def gather_one(send: Tensor) -> Tensor:
        return gather(send)[0]

    return [
        ("sparse all-gather", "cupy.cuda.nccl", sparse),
        (
            "packed all-reduce",
            "cupy.cuda.nccl, gck's kernels",
            _composed(rank, world_size, exchange, gather_one),
        ),
        ("all-reduce", "cupy.cuda.nccl", dense),
    ]


def _composed(
    rank: int, world_size: int, exchange: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]
) -> Method:
    """The packed all-reduce by hand, of gck's kernels and another library's messages: nothing is agreed on,
    saved or waited for."""
    compressor = gck.Sign(CHUNK)

    def packed(task: Packed) -> Tensor:
        nbytes, device = compressor.layout(task.shard).nbytes, task.grad.device
        send = torch.zeros(world_size, nbytes, dtype=torch.uint8, device=device)
        compressor.compress_(task.grad, task.err, send)
        received = exchange(send)
        body = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        valid = valid_of(rank, task)
        if valid:
            layout, err = compressor.layout(valid), task.server_err[:valid]
            options = {"capacity": task.shard, "divisor": world_size}
            reduce_(compressor, received, err, body[: layout.nbytes], valid, **options)
        for owner, row in enumerate(gather(body)):
            count = valid_of(owner, task)
            if count:
                part = task.grad[owner * task.shard :][:count]
                compressor.decompress_(part, row[: compressor.layout(count).nbytes])
        return task.grad

    def valid_of(owner: int, task: Packed) -> int:
        return max(0, min(task.shard, task.count - owner * task.shard))

    return packed
