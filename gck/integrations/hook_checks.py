"""Checks of what `HookState` is given, and of what it loads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from gck.compressor import Compressor
from gck.compressor_choice import CompressorChoice
from gck.error_feedback import ErrorFeedbackMap, check_version
from gck.errors import ArgumentError, DtypeError, StateMismatchError
from gck.factored import is_factored
from gck.kernels.common.checks import GRAD_DTYPES
from gck.values import MOST_FP64, plain_int, shown

__all__ = [
    "check_dtypes",
    "check_layout",
    "check_units",
    "checked_count",
    "checked_names",
    "checked_saved",
    "trained",
]


def checked_names(names: object) -> frozenset[str]:
    """Raises DtypeError unless they are a collection of strings."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise DtypeError(f"HookState: bypass_names must be a collection of names, got {shown(names)}")
    for name in names:
        if not isinstance(name, str):
            raise DtypeError(f"HookState: bypass_names must be strings, got {shown(name)}")
    return frozenset(names)


def checked_count(name: str, value: object, function: str = "HookState", least: int = 0) -> int:
    """Raises DtypeError unless it is an int, ArgumentError where it is below `least`."""
    value = plain_int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
    if value < least:
        raise ArgumentError(f"{function}: {name} must be at least {least}, got {value}")
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
    """Raises StateMismatchError where residuals are of this rank's shard of a node's sum, which was cut
    between other chunks than the compressor now has: they would be refused in the next step."""
    for name, state in residuals.items():
        compressor = choice.of(function, name)
        if state.shard is None or (compressor is not None and is_factored(compressor)):
            continue  # rows of matrices are found where they are cut
        unit = None if compressor is None else compressor.shard_unit or 1
        if unit != state.shard.unit:
            raise StateMismatchError(
                f"{function}: the ranks of a node share {name} by chunks of {state.shard.unit} elements, in "
                f"which its residuals are kept, and {compressor} has others; continue with a new state"
            )


def check_dtypes(function: str, model: DistributedDataParallel) -> None:
    """Raises DtypeError where DDP will give the hook gradients that gck does not take, compressed or not."""
    if getattr(model, "mixed_precision", None) is not None:
        return  # by which gradients have a dtype of their own
    for name, parameter in trained(model):
        if parameter.dtype not in GRAD_DTYPES:
            raise DtypeError(
                f"{function}: gradients must be of fp32, bf16 or fp16, those of {name} are of "
                f"{parameter.dtype}; what DDP is to leave alone it must be told before it wraps the model, "
                "by DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
            )


def trained(model: DistributedDataParallel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters whose gradients DDP averages: of those that it is to ignore it knows each place by its
    name, with a dot in front of those of the outermost module."""
    ignored = getattr(model, "parameters_to_ignore", ())
    places = {
        id(parameter)
        for prefix, module in model.module.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and f"{prefix}.{name}" not in ignored
    }
    for name, parameter in model.module.named_parameters():
        if id(parameter) in places:
            yield name, parameter
