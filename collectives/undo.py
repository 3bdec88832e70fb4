"""What puts a state back as it was before a collective that failed.

The worker residual is as large as the gradient, so that copying it takes as long as compressing. All is
copied part by part, each as it is about to change: mostly while messages are on the wire.
"""

from __future__ import annotations

from torch import Tensor

from gck.collectives.scratch import Scratch
from gck.error_feedback import ErrorFeedback
from gck.memory import copy_

__all__ = ["Kept", "Undo"]


class Kept:
    """A flat tensor whose parts can be put back as they were; None: nothing to keep.

    Args:
        memory: where copies are made.
    """

    def __init__(self, tensor: Tensor | None, memory: Scratch) -> None:
        self._tensor, self._memory = tensor, memory
        self._copy: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []

    def keep(self, start: int = 0, stop: int | None = None) -> None:
        """Call before elements [start, stop) change; once for each. Default: all."""
        if self._tensor is None:
            return
        if self._copy is None:
            shape = tuple(self._tensor.shape)
            self._copy = self._memory.empty(shape, self._tensor.dtype, self._tensor.device)
        part, copy = self._tensor[start:stop], self._copy[start:stop]
        copy_(copy, part)
        self._parts.append((part, copy))

    def restore(self) -> None:
        """Puts the parts that were kept back."""
        for part, copy in self._parts:
            part.copy_(copy)


class Undo:
    """One tensor and its state, before a collective.

    Args:
        grad: (numel,), of any dtype.
        state: None: nothing is kept of it.
        memory: where copies are made.

    Attributes:
        grad, worker, server: whoever changes one of them calls its `keep` before. Of residuals that the state
            has not yet nothing is kept: they are made on first use, and dropped again.
    """

    def __init__(self, grad: Tensor, state: ErrorFeedback | None, memory: Scratch) -> None:
        self._state = state
        worker, server = (None, None) if state is None else (state.worker, state.server)
        self.grad, self.worker, self.server = (Kept(each, memory) for each in (grad, worker, server))
        by_parts = {id(worker), id(server)}
        self._saved = (
            None if state is None else state.snapshot(lambda t: t if id(t) in by_parts else t.clone())
        )

    def restore(self) -> None:
        """Puts everything back, in the same buffers."""
        for kept in (self.grad, self.worker, self.server):
            kept.restore()
        if self._state is not None and self._saved is not None:
            self._state.restore(self._saved)
