"""Asynchronous work that can be held up, for the tests of its queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gck.collectives import SimulatedGroup, SimulatedMember, Work, all_reduce_
from tests.collectives.fragile import Fragile

SOON = 20.0  # seconds; what must not happen at all would take longer


@dataclass(frozen=True)
class Gate(Fragile):
    """A compressor that waits at its first kernel call until it is opened, and notes what it runs in."""

    fail_at: int = 0
    opened: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    seen: list[Any] = field(default_factory=list, compare=False, repr=False)

    def compress_(self, *args: Any, **kwargs: Any) -> None:
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.seen.append((threading.current_thread(), torch.get_num_threads(), *modes))
        assert self.opened.wait(60)
        super().compress_(*args, **kwargs)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def reduce(grad: Tensor, state: Any, compressor: Any, member: SimulatedMember) -> Work[Tensor]:
    """Calls the compressor in any world."""
    return all_reduce_(grad, state, compressor, member, algorithm="one_phase", async_op=True)


def one_rank() -> SimulatedMember:
    return SimulatedGroup(1, timeout=60).members[0]


def gone(thread: threading.Thread | None) -> bool:
    if thread is not None:
        thread.join(SOON)
    return thread is None or not thread.is_alive()


def worker_of(member: SimulatedMember) -> threading.Thread | None:
    return member.calls.queue._worker
