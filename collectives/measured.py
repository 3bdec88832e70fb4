"""Statistics of what a reduction compresses, for states that ask for them: see `gck.ErrorFeedback.measure`.

Vectors are compressed in rows, in pieces, or by what knows no statistics; so they are taken around all that,
by one read of gradient and residual before, and one of the residual afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.compressor import Compressor, entries_of
from gck.error_feedback import ErrorFeedback
from gck.kernels.common.measure import Measurement
from gck.statistics import Statistics

__all__ = ["Measured"]


class Measured:
    """Begun before any residual changes; `end` when all are what they will be, `publish` when nothing fails.

    Args:
        errs: the worker residuals; None: nothing is added to the gradient.
        states: of each gradient; those that are None, or do not measure, are left alone.
        lossy: False where all of it is sent as it is.
    """

    def __init__(
        self,
        compressor: Compressor,
        grads: Sequence[Tensor],
        errs: Sequence[Tensor | None],
        states: Sequence[ErrorFeedback | None],
        *,
        lossy: bool = True,
    ) -> None:
        self._begun: list[tuple[ErrorFeedback, Tensor, Measurement, int]] = []
        self._values: list[tuple[ErrorFeedback, Tensor, int]] = []
        for grad, err, state in zip(grads, errs, states, strict=True):
            numel = grad.numel()
            if state is None or not state.measure or not numel:
                continue
            if err is None:  # x + (-0.0) is x for every x
                err = torch.full((numel,), -0.0, device=grad.device)
            sent = entries_of(compressor, numel) if lossy else numel
            self._begun.append((state, err, Measurement(compressor, grad, err), sent))

    def end(self) -> None:
        """Measures what was left."""
        self._values = [
            (state, begun.finish(err, sent), err.numel()) for state, err, begun, sent in self._begun
        ]

    def publish(self) -> None:
        """Replaces the states' statistics, which cannot fail any more; may be called again."""
        for state, values, numel in self._values:
            state.statistics = Statistics(values, numel)
