"""A transport that damages what it has received, when it is told to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.soak.plan import Fault
from gck.collectives.transports import CallLog, Transport

__all__ = ["Faulty"]


KEPT = 16  # payloads of other shapes, of which one may be repeated


class Faulty:
    """Implements `Transport` over another one, above the network and below the checksums."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._fault: Fault | None = None
        self._place = 0
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.done = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def calls(self) -> CallLog:
        return self._inner.calls

    def arm(self, fault: Fault | None) -> None:
        """For the next collective."""
        self._fault, self._place, self.done = fault, 0, False

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return self._received(self._inner.all_gather_bytes(send))

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self._received(self._inner.all_to_all_bytes(send))

    def _received(self, rows: Tensor) -> Tensor:
        if rows.shape[1] == 16:  # a verdict
            return rows
        shape = tuple(rows.shape)
        victim = (self._inner.rank + 1) % self._inner.world_size
        kept = self._kept.get(shape)
        self._kept.pop(shape, None)
        self._kept[shape] = rows.clone()
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        if self._fault is not None and self._place == self._fault.place:
            before = rows[victim].clone()
            match self._fault.kind:
                case "flip":
                    rows[victim, rows.shape[1] // 3] ^= 16
                case "truncate":
                    rows[victim, rows.shape[1] // 2 :] = 0
                case "repeat" if kept is not None:
                    rows[victim] = kept[victim]
            self.done = not bool((rows[victim] == before).all())
        self._place += 1
        return rows
