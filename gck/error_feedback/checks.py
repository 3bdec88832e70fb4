"""Checks of saved states, and of what states are changed by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gck.error_feedback.bindings import ServerBinding, ShardBinding
from gck.errors import ArgumentError, DtypeError, StateMismatchError
from gck.values import MOST_FP64, plain_int, plain_real, shown
from gck.wire import has_memory

__all__ = [
    "STATE_VERSION",
    "check_factor",
    "check_place",
    "check_version",
    "checked_residual",
    "is_finite",
    "saved_basis",
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


def check_place(function: str, rank: object, world_size: object, numel: object = None) -> None:
    """Each is None or an int in its range.

    Raises:
        DtypeError, ArgumentError: one is not.
    """
    size = math.inf if world_size is None else world_size
    for name, value, least, end in (
        ("world_size", world_size, 1, math.inf),
        ("rank", rank, 0, size),
        ("numel", numel, 0, math.inf),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
        if value is not None and not least <= value < cast("float", end):
            of = f" of world size {world_size}" if name == "rank" and world_size is not None else ""
            raise ArgumentError(f"{function}: {name} out of range, got {value}{of}")


def saved_binding(kind: type[B], state: Any, name: str) -> B:
    """The binding that the entries of `state` say; `name` is what it belongs to, for texts.

    Raises:
        StateMismatchError: an entry is missing, no int, or out of range.
    """
    try:
        values = [plain_int(state[key]) for key in kind._fields]
    except (KeyError, TypeError) as error:
        raise StateMismatchError(f"load_state_dict: {error!r} in the saved {name}") from error
    binding = kind(*values)
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if not (whole and min(values) >= 0 and binding.world_size >= 1 and binding.unit >= 1):
        raise StateMismatchError(f"load_state_dict: {shown(binding)} in the saved {name}")
    return binding


def saved_residual(state: Mapping[str, Any], name: str) -> Tensor | None:
    """The residual `name` of a saved state; None where it has none.

    Raises:
        StateMismatchError: it is no flat float32 tensor, or something in it is not finite.
    """
    value = state.get(name)
    return None if value is None else checked_residual(f"load_state_dict: the saved {name} residual", value)


def saved_basis(state: Mapping[str, Any]) -> Tensor | None:
    """The basis of a saved state, (rank, columns); None where it has none.

    Raises:
        StateMismatchError: it is no flat float32 tensor of whole rows, or something in it is not finite.
    """
    if state.get("basis") is None:
        return None
    basis = checked_residual("load_state_dict: the saved basis", state["basis"])
    columns = plain_int(state.get("columns"))
    whole = isinstance(columns, int) and not isinstance(columns, bool) and columns >= 1
    if not whole or not basis.numel() or basis.numel() % columns:
        raise StateMismatchError(
            f"load_state_dict: the saved basis has {basis.numel()} elements, in rows of {shown(columns)}"
        )
    return basis.view(-1, columns)


def checked_residual(what: str, value: object) -> Tensor:
    """`value`, of which errors say `what`.

    Raises:
        StateMismatchError: it is no flat float32 tensor, or something in it is not finite.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() != 1:
        raise StateMismatchError(f"{what} must be flat float32, got {shown(value)}")
    if value.layout is not torch.strided:
        raise StateMismatchError(f"{what} must be dense, got {value.layout}")
    if not has_memory(value):
        raise StateMismatchError(f"{what} has no memory to be read, got {shown(value)}")
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
