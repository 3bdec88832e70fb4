"""Several messages between ranks as one work, by gloo's sends and receives, and a thread that sees to them.

gloo cannot be asked whether a send or a receive has ended, only be waited for, and whoever waits cannot
compute meanwhile.

What an exchange receives and sends first is posted by whoever starts it: threads take their time to wake up.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from traceback import clear_frames
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
        send, recv: this rank's messages, if they are known, and where those of others go.
        timeout: seconds that each wait may take.
        after: one that sends everything first.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Tensor | None,
        recv: Tensor,
        rank: int,
        timeout: float,
        after: Exchange | None = None,
    ) -> None:
        self._group: Any = group
        self._send: Any = send
        self._recv: Any = recv
        self._rank, self._timeout, self._after = rank, timeout, after
        self._posted: list[Any] = []  # all works
        self._lock = threading.Lock()  # between whoever starts it and the thread, when that comes to its end
        self._stopped = self._ended = False
        self._nearly = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> None:
        """Posts what may be received and sent at once; the rest follows on a thread."""
        try:
            self._post()
            # A daemon, or the interpreter would wait for it as long as for what never comes; joined at exit,
            # since one that comes back from C++ when the interpreter has ended takes it down.
            name = f"gck {type(self).__name__.lower()}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            join_at_exit(thread)
            thread.start()
        except BaseException as error:
            self._end(error)
            self._let_go()
            raise

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until its end, or as long.

        Raises:
            RuntimeError: it goes on.
            What it ended by.
        """
        if not self._done.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("timed out: the exchange is still under way")
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
        """Nothing more is sent, of this one and those before it: connections are about to be closed."""
        self._stopped, after = True, self._after
        self._wake()
        if after is not None:
            after.stop()

    @abstractmethod
    def _post(self) -> None:
        """On the thread of whoever starts it."""

    @abstractmethod
    def _exchange(self) -> None:
        """On the thread of its own, when the one before it is near its end."""

    @abstractmethod
    def _wake(self) -> None:
        """Lets everybody go who waits for something before its end."""

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self._after is not None:
                self._after.nearly()
            self._exchange()
        except BaseException as raised:
            error = raised
        self._end(error)
        if error is not None:
            # What comes for a receive that nobody holds any more keeps gloo's thread busy for ever. After
            # `stop` connections are closed.
            until = time.monotonic() + self._timeout
            for work in self._posted:
                if not self._stopped:
                    with suppress(BaseException):
                        self._await([work], until)
        self._let_go()

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self._ended = True
        if error is not None:
            clear_frames(error.__traceback__)  # which hold the group
        self._error = error
        for event in (self._nearly, self._done):
            event.set()
        self._wake()

    def _let_go(self) -> None:
        """Whoever keeps this for its end must not keep the group, nor the memory; of which works go first."""
        self._forget()
        self._posted = []
        self._after = self._group = self._send = self._recv = None

    @abstractmethod
    def _forget(self) -> None:
        """Lets go of works."""

    def _may_send(self) -> bool:
        """Whether the thread need not be waited for; ask it with the lock, and keep that while you send."""
        after = self._after
        return not self._stopped and not self._ended and (after is None or after.is_near())

    def _receive_from(self, source: int, message: Parts) -> list[Any]:
        # Not by dist.irecv, which takes as long again as the call itself.
        return self._keep(self._group.recv([part], source, tag) for tag, part in message)

    def _send_to(self, to: int, message: Parts) -> list[Any]:
        return self._keep(self._group.send([part], to, tag) for tag, part in message)

    def _keep(self, works: Iterable[Any]) -> list[Any]:
        kept = []
        for work in works:
            self._posted.append(work)
            kept.append(work)
        return kept

    def _await(self, works: Iterable[Any], until: float | None = None) -> None:
        if until is None:
            until = time.monotonic() + self._timeout
        for work in works:
            if work is not None:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))

    def _go_on(self) -> None:
        if self._stopped:
            raise GroupUnusableError("the group was given up meanwhile")
