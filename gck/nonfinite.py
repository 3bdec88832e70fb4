"""Steps that are skipped because something in them is not finite: their residuals are put back.

With loss scaling, a step whose gradients overflow is thrown away. What it sent is thrown away with it, so
that residuals must be as if it had never been. What is not finite on one rank reaches the results of all,
and results are the same bits on all ranks: looking at its own, each rank decides like the others, and
none has to ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, Snapshot

__all__ = ["StepGuard", "skip_nonfinite"]


class StepGuard:
    """The residuals of one step as they were, and the results that decide whether it counts.

    Attributes:
        skipped: whether the last step that came to its end was skipped.
    """

    def __init__(self) -> None:
        self.skipped = False
        self._saved: dict[int, tuple[ErrorFeedback, Snapshot]] = {}
        # Copies of the last step, to be overwritten: new memory costs the host more than the copy.
        self._spare: dict[int, tuple[ErrorFeedback, Snapshot]] = {}
        self._results: list[Tensor] = []

    def keep(self, states: Iterable[ErrorFeedback | None]) -> None:
        """Copies residuals before this step changes them; those that it has copied already it leaves."""
        for state in states:
            if state is not None and id(state) not in self._saved:
                _, old = self._spare.pop(id(state), (state, None))
                self._saved[id(state)] = (state, state.snapshot() if old is None else _again(state, old))

    def watch(self, result: Tensor) -> None:
        """Notes a tensor that will hold a result of this step when `finish` is called."""
        self._results.append(result)

    def finish(self) -> bool:
        """Ends the step; whether it is skipped. If so, residuals are put back. Waits for the device."""
        self.skipped = any_nonfinite(self._results)
        self._end(undo=self.skipped)
        return self.skipped

    def abandon(self) -> None:
        """Ends a step that failed: residuals are put back."""
        self._end(undo=True)

    def _end(self, undo: bool) -> None:
        for state, snapshot in self._saved.values() if undo else ():
            state.restore(snapshot)
        self._saved, self._spare = {}, self._saved
        self._results.clear()


def _again(state: ErrorFeedback, old: Snapshot) -> Snapshot:
    """A snapshot in the memory of an older one of the same buffers."""
    pairs = ((state.worker, old.worker), (state.server, old.server), (state.nonfinite, old.nonfinite))
    if any(buffer is not (None if pair is None else pair[0]) for buffer, pair in pairs):
        return state.snapshot()
    for _, pair in pairs:
        if pair is not None:
            pair[1].copy_(pair[0])
    return old._replace(statistics=state.statistics, basis=state.basis)


@contextmanager
def skip_nonfinite(
    residuals: ErrorFeedback | ErrorFeedbackMap | Iterable[ErrorFeedback], results: Iterable[Tensor]
) -> Iterator[StepGuard]:
    """Around the collectives of one step: puts the residuals back where a result is not finite.

        with gck.skip_nonfinite(residuals, grads) as step:
            for name, grad in zip(names, grads):
                gck.all_reduce_(grad, residuals[name], compressor)
        # step.skipped is the same on all ranks; a GradScaler sees the same in the gradients

    Costs a copy of the residuals for the time of the step, and one read of the results at its end, where the
    host waits for the device. Sends nothing. Where the block raises, residuals are put back as well: the
    step can be done again from its backward pass.

    Args:
        residuals: all that the block uses.
        results: the tensors that hold the reduced gradients at the end of the block; on any devices.
    """
    guard = StepGuard()
    known: set[str] = set()
    if isinstance(residuals, ErrorFeedbackMap):
        known.update(residuals)
        guard.keep(state for _, state in residuals.items())
    else:
        guard.keep([residuals] if isinstance(residuals, ErrorFeedback) else residuals)
    undo = True
    try:
        yield guard
        for result in results:
            guard.watch(result)
        undo = guard.finish()
    finally:
        if undo:
            guard.abandon()
            for name, state in residuals.items() if isinstance(residuals, ErrorFeedbackMap) else ():
                if name not in known:
                    state.reset()


def any_nonfinite(tensors: Iterable[Tensor]) -> bool:
    """Whether an entry of them is not finite. One read of each, one wait for each device."""
    flags: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.numel():
            # NaN goes through both, and nothing is allocated, as isfinite would.
            low, high = torch.aminmax(tensor.detach())
            finite = low.isfinite() & high.isfinite()
            known = flags.get(tensor.device)
            flags[tensor.device] = finite if known is None else known & finite
    return not all(bool(flag) for flag in flags.values())
