"""A transport that damages what it has received, or stops its process, when it is told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.soak.plan import STOPS, Fault
from gck.collectives.transports import CallLog, Transport

__all__ = ["Faulty"]


VERDICT = 16  # bytes of what ranks say of the messages that they got
KEPT = 16  # payloads of other shapes, of which one may be repeated


class Faulty:
    """Implements `Transport` over another one, above the network and below the checksums."""

    def __init__(self, inner: Transport, stopping: Callable[[float], None]) -> None:
        """
        Args:
            stopping: called with seconds before this process stops; whoever hears of it wakes it up then.
        """
        self._inner, self._stopping = inner, stopping
        self._fault: Fault | None = None
        self._place = 0
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.done = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def calls(self) -> CallLog:
        return self._inner.calls

    def with_timeout(self, seconds: float) -> Faulty:
        """Another one, for a single collective."""
        return Faulty(self._inner.with_timeout(seconds), self._stopping)

    def arm(self, fault: Fault | None) -> None:
        """For the next collective."""
        self._fault, self._place, self.done = fault, 0, False

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        self._stop(send.numel())
        return self._received(self._inner.all_gather_bytes(send))

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        self._stop(send[0].numel())
        return self._received(self._inner.all_to_all_bytes(send))

    def _stop(self, nbytes: int) -> None:
        """Before a payload goes out: with SIGSTOP, which stops every thread of the process."""
        fault = self._fault
        if nbytes == VERDICT or fault is None or fault.kind not in STOPS or self._place != fault.place:
            return
        self._fault, seconds, began = None, STOPS[fault.kind], time.monotonic()
        self._stopping(seconds)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.done = time.monotonic() - began >= seconds / 2

    def _received(self, rows: Tensor) -> Tensor:
        if rows.shape[1] == VERDICT:
            return rows
        shape = tuple(rows.shape)
        victim = (self._inner.rank + 1) % self._inner.world_size
        kept = self._kept.get(shape)
        self._kept.pop(shape, None)
        self._kept[shape] = rows.clone()
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        fault = self._fault
        if fault is not None and self._place == (0 if fault.kind == "header" else fault.place):
            before = rows[victim].clone()
            match fault.kind:
                case "flip":
                    rows[victim, rows.shape[1] // 3] ^= 16
                case "header":  # the first message of all
                    rows[victim, fault.place // 8] ^= 1 << fault.place % 8
                case "truncate":
                    rows[victim, rows.shape[1] // 2 :] = 0
                case "repeat" if kept is not None:
                    rows[victim] = kept[victim]
            self.done = not bool((rows[victim] == before).all())
        self._place += 1
        return rows
