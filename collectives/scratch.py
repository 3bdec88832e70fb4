"""Host memory for the length of one collective, kept for the next.

The C library gives large blocks back to the system when they are freed, and gets them as untouched pages
again: at 25M elements, the faults of a step's buffers take longer than compressing the gradient. On devices
torch's caching allocator does what this does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gck.memory import drop_results

__all__ = ["Scratch", "empty_cache", "scratch"]

SMALL = 1 << 20  # bytes; below it the C library keeps blocks itself
_lock = threading.Lock()
_free: list[Tensor] = []  # uint8; the one given back last is last
_most = [0]  # bytes of the largest collective so far


class Scratch:
    """The buffers of one collective; made by `scratch`."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.empty."""
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        if device.type != "cpu" or nbytes < SMALL:
            return torch.empty(shape, dtype=dtype, device=device)
        block = _take(nbytes)
        self._blocks.append(block)
        return block[:nbytes].view(dtype).view(shape)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.zeros."""
        return self.empty(shape, dtype, device).zero_()

    def clone(self, tensor: Tensor) -> Tensor:
        """As `tensor.clone()`, contiguous."""
        return self.empty(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)

    def _give_back(self) -> None:
        held = sum(block.numel() for block in self._blocks)
        with _lock:
            _most[0] = max(_most[0], held)
            _free.extend(self._blocks)
            while sum(block.numel() for block in _free) > _most[0]:
                del _free[0]


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Buffers that may be used until the block ends, and by nobody after.

    Where it ends by an exception they are not kept: a transport's threads may still write to them.
    """
    buffers = Scratch()
    yield buffers
    buffers._give_back()


def empty_cache() -> None:
    """Gives the host memory that collectives keep back to the system, as torch.cuda.empty_cache does.

    It is at most what the largest collective has used for copies and results: about 12 bytes an element; and
    what compressing and decoding keep of results that were freed: at most 256 MiB.
    """
    with _lock:
        _free.clear()
        _most[0] = 0
    drop_results()


def _take(nbytes: int) -> Tensor:
    """The smallest free block that fits and is not much too large, or a new one."""
    with _lock:
        fitting = [i for i, block in enumerate(_free) if nbytes <= block.numel() <= 2 * nbytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].numel()))
    return torch.empty(nbytes, dtype=torch.uint8)
