"""Checks of what `HookState` is given, and of what it loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gck.compressor import Compressor
from gck.compressor_choice import CompressorChoice
from gck.error_feedback import ErrorFeedbackMap, check_version
from gck.errors import ArgumentError, DtypeError, StateMismatchError
from gck.values import MOST_FP64, plain_int, shown

__all__ = ["check_layout", "check_units", "checked_count", "checked_names", "checked_saved"]


def checked_names(names: object) -> frozenset[str]:
    """Raises DtypeError unless they are a collection of strings."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise DtypeError(f"HookState: bypass_names must be a collection of names, got {shown(names)}")
    for name in names:
        if not isinstance(name, str):
            raise DtypeError(f"HookState: bypass_names must be strings, got {shown(name)}")
    return frozenset(names)


def checked_count(name: str, value: object) -> int:
    """Raises DtypeError unless it is an int, ArgumentError where it is negative."""
    value = plain_int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"HookState: {name} must be an int, got {shown(value)}")
    if value < 0:
        raise ArgumentError(f"HookState: {name} must be at least 0, got {value}")
    return value


def checked_saved(state: Mapping[str, Any], fixed: Mapping[str, object]) -> tuple[int, float]:
    """(step, scale) of a saved state.

    Raises:
        StateMismatchError: they or the version are not as they must be, or one of the `fixed` is another.
    """
    function = "HookState.load_state_dict"
    check_version(function, state)
    step, scale = state.get("step"), state.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= MOST_FP64:
        raise StateMismatchError(f"{function}: scale must be positive and finite, got {shown(scale)}")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise StateMismatchError(f"{function}: step must be an int >= 0, got {step!r}")
    for name, present in fixed.items():
        if state.get(name) != present:
            advice = (
                "; every rank saves and loads its own"
                if name == "rank"
                else "; reset_server=True keeps the worker residuals and starts the server's from zero"
            )
            raise StateMismatchError(
                f"{function}: the saved state belongs to {name} {state.get(name)}, this is {name} "
                f"{present}{advice}"
            )
    return step, float(scale)


def check_layout(function: str, name: str, numel: int, compressor: Compressor) -> None:
    """Raises ArgumentError where a compressor can't be of `numel` elements of the parameter `name`."""
    try:
        compressor.layout(numel)
    except ArgumentError as error:
        raise ArgumentError(f"{function}: {name} of {numel} elements: {error}") from error


def check_units(function: str, choice: CompressorChoice, residuals: ErrorFeedbackMap) -> None:
    """Raises StateMismatchError where a server residual belongs to other chunks than the compressor now has:
    it would be refused in the next step, or never be sent."""
    for name, state in residuals.items():
        binding = state.binding
        if state.server is None or binding is None:
            continue
        compressor = choice.of(function, name)
        unit = None if compressor is None else compressor.shard_unit
        if unit != binding.unit:
            raise StateMismatchError(
                f"{function}: {name} has a server residual of chunks of {binding.unit} elements, which "
                f"{compressor} does not work on; continue with a new state that loads this one's with "
                "reset_server=True"
            )
