"""Tables that tell the programs of a launch what they work on: made on the host, and kept on the device.

They are kept by what they follow from, so that a captured graph, and a training loop whose tensors stay in
place, copy nothing. A captured call whose table was made before, by the same call in warm-up, copies nothing;
otherwise each replay copies the table, from memory that stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["KeptTables", "to_device"]

T = TypeVar("T")
Entry = tuple[T, torch.cuda.Stream | None, torch.cuda.Event | None]


class KeptTables(Generic[T]):
    """The tables of one kind of calls; T has what is on the device, and what it was copied from.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._kept: dict[object, Entry[T]] = {}
        self._captured: list[T] = []  # graphs read them for as long as they are replayed: they stay for good
        self._lock = threading.Lock()  # ranks of one process, and calls that were started, are threads

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forgets all that no graph reads."""
        with self._lock:
            self._kept.clear()

    def get(self, key: object, device: torch.device, make: Callable[[], T]) -> T:
        """The table of `key`, which has the device; work on the current stream finds it there."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        capturing = stream is not None and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = known = self._kept.pop(key, None)
            if entry is None:
                table = make()
                entry = table, stream, None if stream is None or capturing else stream.record_event()
            table, made_on, made = entry
            # A capture begins when all streams are done.
            if stream is not None and made is not None and made_on != stream and not capturing:
                stream.wait_event(made)
            if capturing:
                self._captured.append(table)
            if known is not None or not capturing:
                self._kept[key] = entry  # the last one used is the last to go
                if len(self._kept) > self._most:
                    del self._kept[next(iter(self._kept))]
        return table


def to_device(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a captured copy reads at each replay, and the copy, which nobody waits for. host: on the CPU."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)
