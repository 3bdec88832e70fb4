"""Several messages between ranks as one work, by gloo's sends and receives, and a thread that sees to them.

gloo cannot be asked whether a send or a receive has ended, only be waited for, and whoever waits cannot
compute meanwhile.

All receives are posted as an exchange starts, by whoever starts it: gloo sends nothing before it is waited
for, and threads take their time to wake up.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gck.collectives.work.queue import join_at_exit
from gck.errors import GroupUnusableError

__all__ = ["Exchange", "Parts", "parts"]

Parts = Iterable[tuple[int, Tensor]]  # of a message, each with its tag


def parts(message: Tensor, ends: list[int], tag: int) -> Iterator[tuple[int, Tensor]]:
    """The parts of a flat uint8 message that end there, as views; with tags from this one on."""
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield tag + i, message[start:end]


class Exchange(ABC):
    """What is under way between this rank and others, in the manner of torch.distributed's works.

    `start` starts it.

    Args:
        send, recv: this rank's messages, and where those of others go.
        timeout: seconds that each wait may take.
        after: one that sends everything first.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Tensor,
        recv: Tensor,
        rank: int,
        timeout: float,
        after: Exchange | None = None,
    ) -> None:
        self._group: Any = group
        self._send: Any = send
        self._recv: Any = recv
        self._rank, self._timeout, self._after = rank, timeout, after
        self._stopped = False
        self._nearly = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> None:
        """Posts receives, and what may be sent at once; the rest follows on a thread."""
        self._post()
        # No daemon: such a thread that comes back from C++ when the interpreter has ended takes it down. The
        # interpreter joins others before it ends, but not those that a daemon starts after that.
        thread = threading.Thread(target=self._run, name=f"gck {type(self).__name__.lower()}", daemon=False)
        join_at_exit(thread)
        thread.start()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until its end, which the timeouts of its waits bound."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def nearly(self) -> None:
        """Waits until everything has been sent, or begun to be, and received but for the last part."""
        self._nearly.wait()
        if self._error is not None:
            raise self._error

    def is_near(self) -> bool:
        """Whether `nearly` would return at once."""
        return self._nearly.is_set() and self._error is None

    @abstractmethod
    def await_peers(self) -> None:
        """Waits until peers have begun to send what they send first, or nothing more will come."""

    def stop(self) -> None:
        """Nothing more is sent, of this one and those before it; what is under way may last its timeout."""
        self._stopped, after = True, self._after
        if after is not None:
            after.stop()

    @abstractmethod
    def _post(self) -> None:
        """On the thread of whoever starts it."""

    @abstractmethod
    def _exchange(self) -> None:
        """On the thread of its own, when the one before it is near its end."""

    @abstractmethod
    def _forget(self) -> None:
        """At its end, however it came: lets go of works and of those who wait for it."""

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after.nearly()
            self._exchange()
        except BaseException as error:
            self._error = error
        finally:
            # Whoever keeps this for its end must not keep the group, nor the memory.
            self._after = self._group = self._send = self._recv = None
            self._forget()
            for event in (self._nearly, self._done):
                event.set()

    def _may_send(self) -> bool:
        """Whether the thread need not be waited for."""
        after = self._after  # which the thread forgets when it ends
        return not self._stopped and not self._done.is_set() and (after is None or after.is_near())

    def _receive_from(self, source: int, message: Parts) -> list[Any]:
        return [dist.irecv(part, group=self._group, tag=tag, group_src=source) for tag, part in message]

    def _send_to(self, to: int, message: Parts) -> list[Any]:
        return [dist.isend(part, group=self._group, tag=tag, group_dst=to) for tag, part in message]

    def _await(self, works: Iterable[Any], until: float | None = None) -> None:
        if until is None:
            until = time.monotonic() + self._timeout
        for work in works:
            if work is not None:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))

    def _go_on(self) -> None:
        if self._stopped:
            raise GroupUnusableError("the group was given up meanwhile")
