"""Checks of saved states, and of what states are changed by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from gck.error_feedback.bindings import ServerBinding, ShardBinding
from gck.errors import ArgumentError, StateMismatchError
from gck.values import MOST_FP64, plain_real, shown

__all__ = [
    "STATE_VERSION",
    "check_factor",
    "check_version",
    "checked_residual",
    "is_finite",
    "saved_binding",
    "saved_count",
    "saved_residual",
]

STATE_VERSION = 1
B = TypeVar("B", ServerBinding, ShardBinding)


def check_factor(function: str, factor: object, name: str = "factor") -> float:
    """`factor` as a float. Raises ArgumentError unless it is positive, and a number of fp64."""
    factor = plain_real(factor)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= MOST_FP64:
        raise ArgumentError(f"{function}: {name} must be positive and finite, got {shown(factor)}")
    return float(factor)


def check_version(function: str, state: Any) -> None:
    """Raises StateMismatchError unless `state` is a dict of the version that this code writes."""
    if not isinstance(state, Mapping):
        raise StateMismatchError(f"{function}: state must be a dict, got {shown(state)}")
    if state.get("version") != STATE_VERSION:
        raise StateMismatchError(
            f"{function}: state must have version {STATE_VERSION}, got {state.get('version')!r}"
        )


def saved_binding(kind: type[B], state: Any, name: str) -> B:
    """The binding that the entries of `state` say; `name` is what it belongs to, for texts.

    Raises:
        StateMismatchError: an entry is missing, or no int.
    """
    try:
        return kind(*(int(state[key]) for key in kind._fields))
    except (KeyError, TypeError, ValueError) as error:
        raise StateMismatchError(f"load_state_dict: {error!r} in the saved {name}") from error


def saved_residual(state: Mapping[str, Any], name: str) -> Tensor | None:
    """The residual `name` of a saved state; None where it has none.

    Raises:
        StateMismatchError: it is no flat float32 tensor, or something in it is not finite.
    """
    value = state.get(name)
    return None if value is None else checked_residual(f"load_state_dict: the saved {name} residual", value)


def checked_residual(what: str, value: object) -> Tensor:
    """`value`, of which errors say `what`.

    Raises:
        StateMismatchError: it is no flat float32 tensor, or something in it is not finite.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() != 1:
        raise StateMismatchError(f"{what} must be flat float32, got {shown(value)}")
    if not is_finite(value):
        raise StateMismatchError(f"{what} must be finite")
    return value


def is_finite(residual: Tensor) -> bool:
    """Whether all elements are; without memory for an answer of each."""
    return not residual.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(residual))


def saved_count(state: Mapping[str, Any], name: str) -> int:
    """The counter `name` of a saved state.

    Raises:
        StateMismatchError: it is no int, negative, or too large.
    """
    count = state[name]
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**63:
        raise StateMismatchError(f"load_state_dict: {name} must be an int >= 0, got {count!r}")
    return count
