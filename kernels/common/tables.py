"""Tables that tell the programs of a launch what they work on: made on the host, and kept on the device.

They are kept by what they follow from, so that a captured graph, and a training loop whose tensors stay in
place, copy nothing. A captured call whose table was made before, by the same call in warm-up, copies nothing;
otherwise each replay copies the table, from memory that stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["KeptTables", "to_device"]

KEPT = 64  # tables that are remembered

T = TypeVar("T")


class KeptTables(Generic[T]):
    """The tables of one kind of calls; T has what is on the device, and what it was copied from."""

    def __init__(self) -> None:
        self._kept: dict[object, T] = {}
        self._captured: list[T] = []  # graphs read them for as long as they are replayed: they stay for good

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forgets all that no graph reads."""
        self._kept.clear()

    def get(self, key: object, device: torch.device, make: Callable[[], T]) -> T:
        """The table of `key`, which has the device."""
        known = self._kept.pop(key, None)
        table = make() if known is None else known
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._captured.append(table)
        if known is not None or not capturing:
            self._kept[key] = table  # the last one used is the last to go
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return table


def to_device(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a captured copy reads at each replay, and the copy, which nobody waits for."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host, host.to(device, non_blocking=True)
