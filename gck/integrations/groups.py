"""Gradients that are ready at once, and their messages: one for each compressor, and a dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from gck.collectives import Transport
from gck.collectives.reduction import Reduction, prepare
from gck.compressor import Compressor, compressor_of_step
from gck.error_feedback import ErrorFeedback
from gck.integrations.hook_state import HookState
from gck.integrations.parameters import stored_shape

__all__ = ["Group", "grouped", "prepare_groups"]


@dataclass
class Group:
    """Parameters whose gradients share messages.

    Attributes:
        compressor: that of all of them; dense ones have one for texts of errors alone.
        algorithm: as for `gck.all_reduce_`.
        parameters, grads: one gradient each, flat.
    """

    compressor: Compressor
    algorithm: str
    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def feedback(self, state: HookState) -> list[ErrorFeedback | None]:
        """Their residuals; where they are dense, those that there are."""
        create = self.algorithm != "dense"
        return [state.feedback(parameter, create) for parameter in self.parameters]


def grouped(state: HookState, pairs: Sequence[tuple[Tensor, Tensor]], *, warm_up: bool) -> list[Group]:
    """What is reduced without compression, and what by each compressor, in the order of those.

    Args:
        pairs: parameters and their gradients.
        warm_up: all are dense.

    Returns:
        At least one, which is empty only if `pairs` is.

    Raises:
        Those of `HookState.compressor_of`.
    """
    dense = Group(state.compressors[0], "dense")
    packed = [Group(compressor, state.algorithm) for compressor in state.compressors]
    for parameter, grad in pairs:
        chosen = None if warm_up else state.compressor_of(parameter)
        group = next((each for each in packed if each.compressor is chosen), dense)
        group.parameters.append(parameter)
        group.grads.append(grad)
    return [group for group in (dense, *packed) if group.grads] or [dense]


def prepare_groups(
    function: str, state: HookState, groups: Sequence[Group], transport: Transport, step: int
) -> Callable[[], None]:
    """Checks all groups; returns what reduces them, when it has the turn.

    Where one of them fails gradients and residuals of all are as they were.

    Args:
        step: the same on all ranks, of which seeds are made that compressors lack.

    Raises:
        Those of `gck.all_reduce_`.
    """
    calls = [
        prepare(
            function,
            group.grads,
            group.feedback(state),
            _of_step(group, step, transport.rank),
            transport,
            algorithm=group.algorithm,
            validate=state.validate,
            checksum=state.checksum,
            link=state.link,
            names=state.names_of(group.parameters),
            shapes=[stored_shape(parameter) for parameter in group.parameters],
        )
        for group in groups
    ]

    def run() -> None:
        with _unchanged_on_error(state, groups[:-1], calls[-1]):
            for call in calls:
                call()

    return run


def _of_step(group: Group, step: int, rank: int) -> Compressor:
    # What ranks compare of dense messages should be the same at every step.
    return (
        group.compressor if group.algorithm == "dense" else compressor_of_step(group.compressor, step, rank)
    )


@contextmanager
def _unchanged_on_error(state: HookState, earlier: Sequence[Group], last: Reduction) -> Iterator[None]:
    """Puts gradients and residuals back when a later message fails: unless Ctrl-C came when even the last one
    was done, and all are."""
    grads = [(grad, grad.clone()) for group in earlier for grad in group.grads]
    feedback = [each for group in earlier for each in group.feedback(state)]
    saved = [(residuals, residuals.snapshot()) for residuals in feedback if residuals is not None]
    try:
        yield
    except BaseException:
        if not last.written:
            for grad, copy in grads:
                grad.copy_(copy)
            for residuals, snapshot in saved:
                residuals.restore(snapshot)
        raise
