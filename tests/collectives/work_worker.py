"""One rank of test_work_processes.py.

usage: work_worker DIRECTORY lost | exit | late
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from gck.collectives import all_reduce_
from gck.collectives.transports.rotation import Rotation
from gck.collectives.work import queue
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher

NUMEL, CALLS = 1_000_000, 4


def fly(grads: list[torch.Tensor], states: list[ErrorFeedback]) -> list[Any]:
    return [
        all_reduce_(grad, state, Sign(32), algorithm="two_phase", async_op=True)
        for grad, state in zip(grads, states, strict=True)
    ]


def be_late(report: Any) -> None:
    """Threads of rotations start when the interpreter has joined others, and end when nobody waits for what
    they did; `report` gets the names of those that are left behind."""
    start, run = Rotation.start, Rotation._run

    def late_start(rotation: Rotation) -> None:
        time.sleep(0.1)
        start(rotation)

    def late_end(rotation: Rotation) -> None:
        run(rotation)
        time.sleep(0.1)

    Rotation.start, Rotation._run = late_start, late_end  # type: ignore[method-assign]
    # The last one registered is called first.
    atexit.unregister(queue._leave)
    atexit.register(lambda: report([thread.name for thread in threading.enumerate()]))
    atexit.register(queue._leave)


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=60)
    grads = [torch.randn(NUMEL) for _ in range(CALLS)]
    states = [ErrorFeedback() for _ in grads]
    if sys.argv[2] == "late":
        be_late(lambda names: launcher.report(directory, rank, names))
        fly(grads, states)
        sys.exit()
    if sys.argv[2] == "exit":
        fly(grads, states)
        all_reduce_(torch.ones(NUMEL), None, Sign(32))  # in its turn: it waits for them
        launcher.report(directory, rank, [state.worker is not None for state in states])
        fly(grads, states)
        sys.exit()  # with work in flight
    for work in fly(grads, states):
        work.wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    before = [t.clone() for g, s in zip(grads, states, strict=True) for t in (g, s.worker, s.server)]
    began, errors = time.monotonic(), []
    for work in fly(grads, states):
        try:
            work.wait()
            errors.append("none")
        except CollectiveError as error:
            errors.append(type(error).__name__)
    seconds = time.monotonic() - began
    after = [t for g, s in zip(grads, states, strict=True) for t in (g, s.worker, s.server)]
    unchanged = all(same_bytes(a, b) for a, b in zip(before, after, strict=True))
    launcher.report(directory, rank, {"errors": errors, "seconds": seconds, "unchanged": unchanged})
    launcher.leave()
