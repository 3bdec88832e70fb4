"""One rank of `python -m bench.nccl`, started as `python -m bench.nccl.worker ASSIGNMENT`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from bench.nccl.peers import Method, methods
from bench.nccl.tasks import TASKS, Task
from gck.cli.crew import end_with, event_stream, tell

__all__ = ["Assignment", "main"]

BATCHES = 5
MOST = 20  # calls a batch, as in nccl-tests


@dataclass(frozen=True)
class Assignment:
    """What a worker is told on its command line.

    Attributes:
        device: "cpu", where the library works on host memory, or "cuda".
        sizes: bytes, in the sense of nccl-tests.
        seconds: about what one method may take at one size.
    """

    rank: int
    world_size: int
    parent: int
    rendezvous: str
    device: str
    sizes: list[int]
    seconds: float
    timeout: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(argv: list[str]) -> None:
    assignment = Assignment(**json.loads(argv[1]))
    end_with(assignment.parent)
    events = event_stream()
    rank, world_size = assignment.rank, assignment.world_size
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    device = torch.device(assignment.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # What ranks say to one another about the benchmark goes over gloo.
    dist.init_process_group(
        "gloo",
        init_method=(Path(assignment.rendezvous) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=assignment.timeout),
    )
    if rank == 0:
        tell(events, event="begin", what="the peers meet")
    found, absent = methods(rank, world_size, device)
    if rank == 0:
        tell(events, event="absent", absent=absent)
    for name, make in TASKS.items():
        for size in assignment.sizes:
            task = make(rank, world_size, size, device)
            for title, method in found[name].items():
                if rank == 0:
                    tell(events, event="begin", what=f"{name}, {size:,} bytes, {title}")
                measure(task, name, title, method, device, assignment, events)
    dist.barrier()
    events.close()
    sys.stderr.flush()
    os._exit(0)  # destroying groups may hang, see gck.cli.demo.worker


def measure(
    task: Task,
    name: str,
    title: str,
    method: Method,
    device: torch.device,
    assignment: Assignment,
    events: TextIO,
) -> None:
    """Verifies the first result and the last, and times batches in between, by their slowest rank."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def verify() -> None:
        task.reset()
        result = method(task)
        wait()
        task.verify(result)

    def batch(calls: int) -> float:
        dist.barrier()
        method(task)  # now ranks are in step
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            method(task)
        wait()
        seconds = torch.tensor([(time.perf_counter() - began) / calls], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    verify()
    # The same number on all ranks, for all have the same estimate.
    calls = max(1, min(MOST, int(assignment.seconds / BATCHES / batch(1))))
    samples = [batch(calls) for _ in range(BATCHES)]
    verify()
    if assignment.rank == 0:
        tell(
            events,
            event="done",
            task=name,
            method=title,
            nbytes=task.nbytes,
            seconds=samples,
            calls=calls,
            busbw_factor=task.busbw(assignment.world_size),
        )


if __name__ == "__main__":
    main(sys.argv)
