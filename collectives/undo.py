"""What puts a state back as it was before a collective that failed.

The worker residual is as large as the gradient, so that copying it takes as long as compressing. It is copied
part by part, each as it is about to change: of a reduction in pieces, while others are on the wire.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gck.collectives.scratch import Scratch
from gck.error_feedback import ErrorFeedback
from gck.memory import copy_

__all__ = ["Undo"]


class Undo:
    """The state of one tensor, before a collective.

    Args:
        state: None: nothing is kept.
        memory: where copies are made.
    """

    def __init__(self, state: ErrorFeedback | None, memory: Scratch) -> None:
        self._state, self._memory = state, memory
        self._worker = None if state is None else state.worker
        self._kept: list[tuple[int, int]] = []
        self._saved = None if state is None else state.snapshot(self._copy)

    def keep(self, start: int = 0, stop: int | None = None) -> None:
        """Call before elements [start, stop) of the worker residual change; once for each. Default: all."""
        if self._saved is None or self._saved.worker is None:
            return  # zeros, which are made on first use, and dropped again
        worker, copy = self._saved.worker
        stop = worker.numel() if stop is None else stop
        copy_(copy[start:stop], worker[start:stop])
        self._kept.append((start, stop))

    def restore(self) -> None:
        """Puts everything back, in the same buffers."""
        if self._state is None or self._saved is None:
            return
        if self._saved.worker is not None:
            worker, copy = self._saved.worker
            at = 0
            for start, stop in [*sorted(self._kept), (worker.numel(), worker.numel())]:
                copy[at:start].copy_(worker[at:start])  # has not changed
                at = stop
        self._state.restore(self._saved)

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor is not self._worker:
            return self._memory.clone(tensor)
        return self._memory.empty(tuple(tensor.shape), torch.float32, tensor.device)
