"""One rank of test_places.py: the last rank dies, or stalls, at a given place of a two-phase all-reduce.

usage: place_worker DIRECTORY KILL | STOP PLACE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gck.collectives import all_reduce_
from gck.collectives.transports import Done, Started, rotation
from gck.collectives.transports.process_group import ProcessGroupTransport
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher
from tests.collectives.test_places import NUMEL, PLACES, TIMEOUT


def end() -> None:
    os.kill(os.getpid(), getattr(signal, f"SIG{sys.argv[2]}"))


def end_at(place: str) -> None:
    """Makes this process end at a place; others of its operations are as they were."""
    to_all = ProcessGroupTransport.start_all_to_all_as_made
    gather = ProcessGroupTransport.start_all_gather_bytes

    def all_to_all(self: ProcessGroupTransport, send: Tensor, make: Callable[[int], None]) -> Started:
        if place == "before the all-to-all":
            end()
        received = to_all(self, send, make).wait()
        if place == "between the phases":
            end()
        return Done(received)

    def all_gather(self: ProcessGroupTransport, send: Tensor) -> Started:
        started = gather(self, send)
        if place == "during the all-gather":
            end()  # never waited for: of what is on its way some may arrive
        received = started.wait()
        if place == "after the all-gather":
            end()
        return Done(received)

    def rounds(rank: int, world_size: int) -> Any:
        yield next(rotate(rank, world_size))
        end()  # one of two rounds is done

    rotate = rotation.rotation
    if place == "during the all-to-all":
        rotation.rotation = rounds
    ProcessGroupTransport.start_all_to_all_as_made = all_to_all  # type: ignore[method-assign]
    ProcessGroupTransport.start_all_gather_bytes = all_gather  # type: ignore[method-assign]


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=60)
    place = PLACES[int(sys.argv[3])]
    rotation.ROTATE_FROM = 0
    grads = [torch.randn(NUMEL, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    grad, state, result = grads[rank].clone(), ErrorFeedback(), {"error": "none"}
    state.worker_for(grad)
    dist.barrier()
    if rank == world_size - 1:
        end_at(place)
    began = time.monotonic()
    try:
        all_reduce_(grad, state, Sign(64), algorithm="two_phase", validate="off", timeout=TIMEOUT)
    except CollectiveError as error:
        result = {"error": type(error).__name__, "text": str(error)}
    seconds = time.monotonic() - began
    unchanged = same_bytes(grad, grads[rank]) and not state.worker.any() and state.server is None
    bits = grad.view(torch.int32).long().sum().item()
    launcher.report(directory, rank, result | {"seconds": seconds, "unchanged": unchanged, "bits": bits})
    launcher.leave()
