"""One training process of the demo: `python -m gck.cli.demo.worker ASSIGNMENT`, started by `crew`.

It reports on standard output, one JSON object a line: rank 0 every step and every look at the test
images, every rank what it has sent when it is done.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gck.cli.crew import end_with, event_stream, tell
from gck.cli.demo.configurations import CONFIGURATIONS
from gck.cli.demo.model import Images, build_model, load_images
from gck.cli.demo.settings import Assignment, Settings
from gck.cli.links import read_counters

__all__ = ["main"]

# DDP must put all gradients into one bucket: PyTorch's PowerSGD hook runs its collectives from
# callbacks, and with two buckets on gloo ranks may run them in different orders and abort.
BUCKET_MEGABYTES = 64


def main(argv: list[str]) -> None:
    assignment = Assignment.from_json(argv[1])
    end_with(assignment.parent)
    events = event_stream()
    # The workers share one machine; more threads each would only get in each other's way.
    torch.set_num_threads(1)
    train_images, test_images = load_images(Path(assignment.data))
    dist.init_process_group(
        "gloo",
        # A file and not a port: it needs no free port, and nobody else can connect to it.
        init_method=(Path(assignment.rendezvous) / "rendezvous").as_uri(),
        rank=assignment.rank,
        world_size=assignment.settings.workers,
        timeout=timedelta(seconds=assignment.timeout),
    )
    for name in assignment.configurations:
        train(assignment, name, train_images, test_images, events)
        # Nobody may leave while another still talks to it.
        dist.barrier()
    # `destroy_process_group` sometimes hangs (torch 2.6), and so may the interpreter's own way out.
    events.close()
    sys.stderr.flush()
    os._exit(0)


def train(assignment: Assignment, name: str, images: Images, test: Images, events: TextIO) -> None:
    """Trains one configuration; while rank 0 looks at the test images, the clock and the network rest."""
    settings, rank = assignment.settings, assignment.rank
    torch.manual_seed(settings.seed)
    model = DistributedDataParallel(build_model(), bucket_cap_mb=BUCKET_MEGABYTES)
    CONFIGURATIONS[name].attach(model, settings)
    optimizer = torch.optim.SGD(model.parameters(), momentum=settings.momentum)
    order = _batches(len(images), settings)

    step_seconds: list[float] = []
    dist.barrier()
    if rank == 0:
        tell(events, event="begin", configuration=name)
    sent = read_counters(assignment.interface).tx_bytes
    for step in range(1, settings.steps + 1):
        mine = order[step - 1, rank]
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        started = time.perf_counter()
        loss = cross_entropy(model(images.pixels[mine]), images.labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_seconds.append(time.perf_counter() - started)
        if rank == 0:
            tell(events, event="step", step=step)
        if settings.evaluate_after(step):
            dist.barrier()
            if rank == 0:
                _look(events, step, sum(step_seconds), model.module, test)
            dist.barrier()
    if rank == 0:
        tell(events, event="begin", configuration=name)
    sent = read_counters(assignment.interface).tx_bytes - sent
    tell(events, event="done", configuration=name, step_seconds=step_seconds, sent_bytes=sent)


def _look(events: TextIO, step: int, seconds: float, model: nn.Module, test: Images) -> None:
    with torch.no_grad():
        scores = model(test.pixels)
    accuracy = (scores.argmax(1) == test.labels).double().mean().item()
    loss = cross_entropy(scores, test.labels).item()
    tell(events, event="test", step=step, seconds=seconds, accuracy=accuracy, loss=loss)


def _batches(count: int, settings: Settings) -> Tensor:
    """(steps, workers, batch) image numbers: shuffled epochs one after another, the same for every run."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.workers * settings.batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(epochs)[:needed].view(settings.steps, settings.workers, settings.batch)


if __name__ == "__main__":
    main(sys.argv)
