"""What can be said of an all-reduce before ranks exchange anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gck.collectives.cost import cheapest_algorithm
from gck.collectives.transports import Transport
from gck.collectives.two_phase import Shards
from gck.compressor import Compressor, check_compressor, check_seeded, is_seeded, shard_numel
from gck.error_feedback import ErrorFeedback, ServerBinding, ShardBinding
from gck.errors import ArgumentError, AutogradError, DtypeError, ShapeMismatchError
from gck.factored import is_factored
from gck.kernels.common import checks
from gck.values import shown

__all__ = ["check_algorithm", "check_call", "check_states", "plan_of"]

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
    if algorithm != "dense":
        check_seeded(function, compressor)
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
    """Size and binding that each server residual has in two phases; raises where a state belongs to something
    else. Chunks of another size are no reason: see `gck.collectives.folding`."""
    bindings: list[tuple[int, ServerBinding] | None] = []

    def bound(numel: int, unit: int) -> tuple[int, ServerBinding]:
        owned = shard_numel(numel, unit, transport.world_size)
        return owned, ServerBinding(transport.rank, transport.world_size, unit)

    for state, whole, shard in zip(states, cuts, shards, strict=True):
        if state is None:
            bindings.append(None)
            continue
        numel = whole.valid(0 if shard is None else shard.rank)
        state.check_numel(numel, shard)
        if state.binding is not None:
            state.check_server(*bound(numel, state.binding.unit))
        unit = compressor.shard_unit
        bindings.append(None if unit is None else bound(numel, unit))
    return bindings


def plan_of(
    compressors: Sequence[Compressor],
    cuts: Sequence[Shards],
    local_world_size: int,
    world_size: int,
    algorithm: str,
) -> dict[str, list[int]]:
    """Which tensors go by which algorithm, in the same order on all ranks; options that do not fit a
    size raise here, on all ranks and before anything is sent."""
    for compressor, shards in zip(compressors, cuts, strict=True) if algorithm != "dense" else ():
        for numel in {shards.valid(rank) for rank in range(local_world_size)}:
            if numel or local_world_size == 1:
                compressor.layout(numel)
    if algorithm != "auto":
        return {algorithm: list(range(len(cuts)))}
    # Each tensor by itself: whether and how it is compressed must not depend on what it shares a message
    # with, since DDP rebuilds its buckets after the first step, and again after a restart.
    plan: dict[str, list[int]] = {}
    for i, (compressor, shards) in enumerate(zip(compressors, cuts, strict=True)):
        chosen = cheapest_algorithm(compressor, [shards.numel], world_size)
        plan.setdefault(chosen, []).append(i)
    return plan
