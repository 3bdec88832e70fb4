"""One process of `python -m bench.link`, started as `python -m bench.link.worker ASSIGNMENT`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from bench.link.methods import METHODS, Method
from bench.machine import bind
from bench.together import start_together
from gck.cli.crew import end_with, event_stream, tell
from gck.cli.links import read_counters
from gck.collectives import Link, measure_compute, resolve

__all__ = ["Assignment", "main"]


@dataclass(frozen=True)
class Assignment:
    """What a worker is told on its command line.

    Attributes:
        bits_per_second: of the link; None: loopback.
        repeats: of each (method, numel), how many all-reduces are timed.
    """

    rank: int
    world_size: int
    parent: int
    rendezvous: str
    interface: str
    shared_interface: bool  # all workers read the same counters
    bits_per_second: int | None
    timeout: float
    repeats: list[tuple[str, int, int]]


def main(argv: list[str]) -> None:
    assignment = Assignment(**json.loads(argv[1]))
    end_with(assignment.parent)
    events = event_stream()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // assignment.world_size))
    if assignment.bits_per_second is not None:
        bind(assignment.rank, assignment.world_size)
    dist.init_process_group(
        "gloo",
        init_method=(Path(assignment.rendezvous) / "rendezvous").as_uri(),
        rank=assignment.rank,
        world_size=assignment.world_size,
        timeout=timedelta(seconds=assignment.timeout),
    )
    latency = measure_latency()
    if assignment.rank == 0:
        tell(events, event="latency", seconds=latency)
    for title, numel, repeats in assignment.repeats:
        if assignment.rank == 0:
            tell(events, event="begin", method=title, numel=numel)
        measure(assignment, METHODS[title], numel, repeats, events)
    dist.barrier()
    events.close()
    sys.stderr.flush()
    os._exit(0)  # destroying groups may hang, see gck.cli.demo.worker


def measure_latency(repeats: int = 50) -> float:
    """Seconds of a round in which every rank passes 16 bytes on: of links, and of threads that wake up."""
    transport, send, seconds = resolve(None), torch.zeros(16, dtype=torch.uint8), []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        transport.all_gather_bytes(send)
        seconds.append((time.perf_counter() - began) / max(1, transport.world_size - 1))
    return statistics.median(seconds)


def compute_of(method: Method, numel: int) -> float | None:
    """What the cost model cannot know: compressing and so on, of the slowest rank, as all are at it."""
    if method.compressor is None or method.algorithm == "dense":  # that computes inside gloo
        return None if method.compressor is None else 0.0
    world_size = dist.get_world_size()
    own = measure_compute(method.compressor, numel, world_size, method.algorithm, before=dist.barrier)
    slowest = torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def measure(assignment: Assignment, method: Method, numel: int, repeats: int, events: TextIO) -> None:
    bits = assignment.bits_per_second
    run = method.make(numel, None if bits is None else Link.ethernet(bits))
    source = torch.randn(numel, generator=torch.Generator().manual_seed(assignment.rank))
    grad = source.clone()
    for _ in range(method.untimed):
        grad.copy_(source)
        run(grad)
    seconds = []
    dist.barrier()
    time.sleep(0.05)  # the last rank's words of the barrier are not counted
    sent = read_counters(assignment.interface).tx_bytes
    for _ in range(repeats):
        dist.barrier()  # who copies for the next repeat takes the processor from those who have not ended
        grad.copy_(source)
        start_together()
        seconds.append(run(grad))
    dist.barrier()
    time.sleep(0.05)
    sent = read_counters(assignment.interface).tx_bytes - sent
    # A step is over when the last rank has the result.
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    total = torch.tensor([sent], dtype=torch.float64)
    dist.all_reduce(total)
    # On loopback every worker has read what all of them sent.
    shares = assignment.world_size * repeats * (assignment.world_size if assignment.shared_interface else 1)
    compute = compute_of(method, numel)
    if assignment.rank == 0:
        tell(
            events,
            event="done",
            method=method.title,
            numel=numel,
            seconds=slowest.tolist(),
            wire_bytes=total.item() / shares,
            compute=compute,
        )


def to_json(assignment: Assignment) -> str:
    return json.dumps(asdict(assignment))


if __name__ == "__main__":
    main(sys.argv)
