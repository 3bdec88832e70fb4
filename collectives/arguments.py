"""What can be said of an all-reduce before ranks exchange anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.collectives.transports import Transport
from gck.collectives.two_phase import Shards
from gck.compressor import Compressor, check_compressor, is_seeded, shard_numel
from gck.error_feedback import ErrorFeedback, ServerBinding, ShardBinding
from gck.errors import ArgumentError, AutogradError, DtypeError, ShapeMismatchError
from gck.factored import is_factored
from gck.kernels.common import checks
from gck.values import shown

__all__ = ["check_algorithm", "check_call", "check_states"]

OPS = ("avg", "sum")
ALGORITHMS = ("auto", "one_phase", "two_phase", "seeded", "factored", "dense")


def check_algorithm(function: str, compressor: object, algorithm: object) -> None:
    """Raises unless `compressor` is one and can run on `algorithm`.

    Raises:
        DtypeError: compressor is no Compressor.
        ArgumentError: algorithm is unknown, or not for this compressor.
    """
    if algorithm not in ALGORITHMS:
        names = ", ".join(f'"{name}"' for name in ALGORITHMS)
        raise ArgumentError(f"{function}: algorithm must be one of {names}, got {algorithm!r}")
    compressor = check_compressor(function, compressor)
    if algorithm == "factored" and not is_factored(compressor):
        raise ArgumentError(
            f'{function}: algorithm "factored" needs a compressor of two factors, got {compressor}'
        )
    if algorithm == "one_phase" and is_factored(compressor):
        raise ArgumentError(
            f'{function}: algorithm "one_phase" gathers payloads of vectors; {compressor} takes "factored"'
        )
    if algorithm == "two_phase" and compressor.shard_unit is None:
        raise ArgumentError(
            f'{function}: algorithm "two_phase" needs a compressor that works on chunks, got {compressor}'
        )
    if algorithm == "seeded" and not is_seeded(compressor):
        raise ArgumentError(
            f'{function}: algorithm "seeded" needs ranks that choose the same entries, got {compressor}'
        )


def check_call(
    function: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    compressor: Compressor,
    op: str,
    algorithm: str,
) -> None:
    """Everything that can be said without looking at memory or asking a peer."""
    if op not in OPS:
        raise ArgumentError(f'{function}: op must be "avg" or "sum", got {op!r}')
    check_algorithm(function, compressor, algorithm)
    if len(states) != len(grads):
        raise ShapeMismatchError(
            f"{function}: states must be as many as grads, got {len(states)} and {len(grads)}"
        )
    memory: dict[str, Tensor] = {}
    for i, (grad, state) in enumerate(zip(grads, states, strict=True)):
        checks.check_grad(function, grad, f"grads[{i}]" if len(grads) > 1 else "grad")
        checks.check_device(function, f"grads[{i}]", grad, "grads[0]", grads[0])
        if grad.is_inference() and not torch.is_inference_mode_enabled():
            raise AutogradError(
                f"{function}: grads[{i}] was made in inference mode, outside of which it cannot be written"
            )
        memory[f"grads[{i}]"] = grad
        if state is None:
            continue
        if not isinstance(state, ErrorFeedback):
            raise DtypeError(f"{function}: state must be an ErrorFeedback, got {shown(state)}")
        if state.worker is not None:
            memory[f"the worker residual of grads[{i}]"] = state.worker
        if state.server is not None:
            memory[f"the server residual of grads[{i}]"] = state.server
        if (counter := state.nonfinite) is not None:
            plain = type(counter) is Tensor and counter.dtype == torch.int64 and counter.numel() == 1
            if not plain or counter.is_inference():
                checks.check_nonfinite(function, counter, counter)  # which may still be on another device
            memory[f"the counter of grads[{i}]"] = counter
    held = [id(state) for state in states if state is not None]
    if len(set(held)) != len(held):
        raise ArgumentError(f"{function}: two gradients must not share one ErrorFeedback")
    checks.check_no_overlap(function, **memory)


def check_states(
    states: Sequence[ErrorFeedback | None],
    cuts: Sequence[Shards],
    shards: Sequence[ShardBinding | None],
    compressor: Compressor,
    transport: Transport,
) -> list[tuple[int, ServerBinding] | None]:
    """Size and binding of each server residual; raises where a state belongs to something else."""
    bindings: list[tuple[int, ServerBinding] | None] = []
    for state, whole, shard in zip(states, cuts, shards, strict=True):
        if state is None:
            bindings.append(None)
            continue
        numel = whole.valid(0 if shard is None else shard.rank)
        state.check_numel(numel, shard)
        unit = compressor.shard_unit if compressor.shard_unit is not None else _unit(state)
        if unit is None:
            bindings.append(None)
            continue
        owned = shard_numel(numel, unit, transport.world_size)
        bound = ServerBinding(transport.rank, transport.world_size, unit)
        state.check_server(owned, bound)
        bindings.append((owned, bound))
    return bindings


def _unit(state: ErrorFeedback) -> int | None:
    return None if state.binding is None else state.binding.unit
