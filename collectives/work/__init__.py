"""Asynchronous collectives: the queue of one rank's end of a group, and the handles of what is in it.

The collectives of a group run one at a time, in the order in which this rank called them: ranks that call
the same cannot disagree on the order. Asynchronous ones run on a worker thread, which starts with the first
of them; a synchronous one waits for its turn and then runs on the thread that called it.

    1. A call checks its arguments on the caller's thread and joins the line.
    2. Whoever comes first has the turn until it has ended; then comes the next.
    3. The worker completes the handle of what it ran, in the same order.

After CollectiveMismatchError, or a CorruptPayloadError that every rank gets, the line goes on. After any
other error of an asynchronous call the group is aborted: its peers would take the messages of what is queued
behind it for those that are missing. What is queued fails at once with GroupUnusableError.

By file: `handle` is what the caller gets, `queue` whose turn it is, `call` what runs in that turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from gck.collectives.work.handle import Work
from gck.collectives.work.queue import WorkQueue

if TYPE_CHECKING:
    from gck.collectives.transports import Transport

__all__ = ["Work", "WorkQueue", "perform", "submit"]

T = TypeVar("T")


def submit(
    transport: Transport,
    function: str,
    run: Callable[[], T],
    device: torch.device,
    made: Callable[[], Iterable[Tensor]] = tuple,
) -> Work[T]:
    """Queues `run` on the group of `transport`.

    Args:
        transport: what `run` sends by.
        function: name of the public function, for texts.
        run: called on the worker thread, with the turn; collectives that it calls on the group are in it.
        device: of the tensors.
        made: called afterwards: tensors, apart from the result, that `run` may have allocated and outlive it.

    Raises:
        ArgumentError: the current stream is capturing a CUDA graph.
        CollectiveError: called from a callback of work on the same group.
    """
    work = Work(function, run, transport, device, made)
    transport.calls.queue.submit(work)
    return work


def perform(
    transport: Transport,
    function: str,
    run: Callable[[], T],
    device: torch.device,
    async_op: bool,
    made: Callable[[], Iterable[Tensor]] = tuple,
) -> T | Work[T]:
    """Runs `run` in its turn and returns its result, or queues it and returns the handle; see `submit`."""
    if async_op:
        return submit(transport, function, run, device, made)
    # Some transports bound the wait for it.
    turn: Callable[[str], AbstractContextManager[None]] = getattr(
        transport, "turn", transport.calls.queue.turn
    )
    with turn(function):
        return run()
