"""What is refused before it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gck.checkpoint.file import KINDS, size_problem
from gck.error_feedback import checked_residual
from gck.errors import StateMismatchError

__all__ = ["check_apart", "check_loads"]


def check_loads(
    name: str, state: Mapping[str, Any], owner: tuple[int, int] | tuple[None, None], place: tuple[int, int]
) -> None:
    """What `load_state` would refuse is not saved: it would push files that can be loaded out of `keep`."""
    if owner[0] is not None and owner != place:
        raise StateMismatchError(
            f"save_state: the server residual of {name!r} belongs to rank {owner[0]} of {owner[1]}, got rank "
            f"{place[0]} of {place[1]}"
        )
    for kind in KINDS:
        if kind in state:
            checked_residual(f"save_state: the {kind} residual of {name!r}", state[kind])
    if "server" in state and "worker" in state:
        problem = size_problem(state, state["worker"].numel(), state["server"].numel(), place[1])
        if problem:
            raise StateMismatchError(f"save_state: a server residual of {name!r} {problem}")


def check_apart(states: Mapping[str, Mapping[str, Any]]) -> None:
    """Residuals of one memory would be loaded as two, each with all that both have left out."""
    residuals = []
    for name, state in states.items():
        for kind in KINDS:
            if kind in state and state[kind].numel():
                device, start = state[kind].device, state[kind].data_ptr()
                residuals.append((str(device), start, start + state[kind].nbytes, f"{kind} of {name!r}"))
    residuals.sort()
    for (device, _, end, one), (other_device, other_start, _, other) in pairwise(residuals):
        if device == other_device and other_start < end:
            raise StateMismatchError(f"save_state: the residuals {one} and {other} share memory")
