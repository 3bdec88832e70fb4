"""The public all-reduces: checks, the choice of an algorithm, and all-or-nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from gck.collectives.all_gather import one_phase
from gck.collectives.cost import choose_algorithm
from gck.collectives.dense import dense
from gck.collectives.handshake import Signature, agree, check_validate, describe
from gck.collectives.transports import Transport, resolve
from gck.collectives.two_phase import two_phase
from gck.collectives.work import Work, check_async_op, perform
from gck.compressor import Compressor, compressor_class, shard_numel
from gck.error_feedback import ErrorFeedback, ServerBinding
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks

__all__ = ["all_reduce_", "all_reduce_many_", "packed_all_reduce_"]

T = TypeVar("T")
OPS = ("avg", "sum")
ALGORITHMS = ("auto", "one_phase", "two_phase", "dense")


# fmt: off
@overload
def all_reduce_(
    grad: Tensor, state: ErrorFeedback | None, compressor: Compressor, group: Any = None, op: str = "avg",
    algorithm: str = "auto", *, validate: str = "first", timeout: float | None = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_reduce_(
    grad: Tensor, state: ErrorFeedback | None, compressor: Compressor, group: Any = None, op: str = "avg",
    algorithm: str = "auto", *, validate: str = "first", timeout: float | None = None,
    async_op: Literal[True],
) -> Work[Tensor]: ...
# fmt: on
def all_reduce_(
    grad: Tensor,
    state: ErrorFeedback | None,
    compressor: Compressor,
    group: Any = None,
    op: str = "avg",
    algorithm: str = "auto",
    *,
    validate: str = "first",
    timeout: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """Averages a gradient over the group through a compressor, with error feedback.

    Every rank ends with the same bits. What the messages left out stays in `state` and is added to the
    next gradient, so nothing is lost, only late. Sums are taken in fp32 and rounded to the gradient's
    dtype once. The compressed algorithms add in rank order. The order of the dense one is the
    backend's: from three ranks on, the last bits may depend on the backend and on the message's size.
    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"
    (ICML 2019), Algorithm 2; the two-phase algorithm is that of "1-bit Adam" (ICML 2021).

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape and number of elements; overwritten by the
            decoded average.
        state: the residuals of this tensor on this rank, updated; None for no error feedback.
        compressor: how to compress; the same on all ranks.
        group: None (WORLD), a torch ProcessGroup, an `NcclCommunicator` or a member of a
            `SimulatedGroup`.
        op: "avg" or "sum".
        algorithm: "one_phase" gathers payloads, "two_phase" shards the vector (chunked compressors
            only), "dense" sends fp32 uncompressed, residual included, and leaves none; "auto" takes
            the one that sends least, see `gck.collectives.choose_algorithm`.
        validate: when ranks compare what they call: "first" time they meet a configuration, "always" or
            "off". The same on all ranks. With "first", ranks that later mix up configurations which they
            have met are not noticed: gloo may end the process, or a payload be refused as corrupt; take
            "always" (a small message more a call) where configurations change during training.
        timeout: seconds that each wait may take. Default: the group's own.
        async_op: return a handle at once, and reduce on another thread, after what the group has in flight
            and before what it is given later. Errors of arguments are raised here, all others by the
            handle's `wait`. Until then grad and state must be left alone, and be with one group.

    Returns:
        grad; a `Work` whose `wait` returns it where async_op is true.

    Raises:
        ArgumentError: an argument is out of range or does not fit another.
        StateMismatchError: state belongs to another tensor, rank or world size.
        CollectiveMismatchError: ranks call different things; on all ranks, and the group stays usable.
        PeerLostError, CollectiveTimeoutError: a peer died or did not answer; the group is unusable.
        GroupUnusableError: an earlier failure spoilt the group.

        Whatever is raised, grad and state are as they were. Arguments are checked before ranks
        exchange anything: a check that fails on one rank only (a gradient that is not contiguous there,
        say) raises there, while its peers wait for it until their timeout, which spoils the group for
        them. The rank that raised must not go on with the group either: its next message would be taken
        for the one that is missing.
    """
    states = [state]
    transport = resolve(group, timeout)
    run = prepare("all_reduce_", [grad], states, compressor, transport, op, algorithm, validate, async_op)
    return _perform("all_reduce_", transport, run, grad, states, grad, async_op)


# fmt: off
@overload
def all_reduce_many_(
    grads: Sequence[Tensor], states: Sequence[ErrorFeedback | None] | None, compressor: Compressor,
    group: Any = None, op: str = "avg", algorithm: str = "auto", *, validate: str = "first",
    timeout: float | None = None, async_op: Literal[False] = False,
) -> None: ...
@overload
def all_reduce_many_(
    grads: Sequence[Tensor], states: Sequence[ErrorFeedback | None] | None, compressor: Compressor,
    group: Any = None, op: str = "avg", algorithm: str = "auto", *, validate: str = "first",
    timeout: float | None = None, async_op: Literal[True],
) -> Work[None]: ...
# fmt: on
def all_reduce_many_(
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None] | None,
    compressor: Compressor,
    group: Any = None,
    op: str = "avg",
    algorithm: str = "auto",
    *,
    validate: str = "first",
    timeout: float | None = None,
    async_op: bool = False,
) -> Work[None] | None:
    """`all_reduce_` of several tensors with one message a phase; all on one device.

    With "auto" each tensor takes the algorithm that it would take alone, and tensors of one algorithm
    share messages. Tensors that are compressed get the bits that they would get alone, however they are
    grouped. Dense ones get the same bits on every rank, but from three ranks on these may depend on the
    grouping: the backend adds in an order that follows from the place in the message, as a ring does
    whose chunks end elsewhere.

    Args:
        grads: tensors as for `all_reduce_`; must not overlap.
        states: one `ErrorFeedback` (or None) a tensor; None: no error feedback at all.

    Other arguments and errors are those of `all_reduce_`; an error leaves every tensor as it was.
    """
    function, transport, grads = "all_reduce_many_", resolve(group, timeout), list(grads)
    kept = [None] * len(grads) if states is None else list(states)
    run = prepare(function, grads, kept, compressor, transport, op, algorithm, validate, async_op)
    return _perform(function, transport, run, grads[0] if grads else None, kept, None, async_op)


# fmt: off
@overload
def packed_all_reduce_(
    grad: Tensor, err: Tensor, server_err: Tensor, chunk_size: int = 256, group: Any = None,
    op: str = "avg", *, nonfinite: Tensor | None = None, validate: str = "first",
    timeout: float | None = None, async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def packed_all_reduce_(
    grad: Tensor, err: Tensor, server_err: Tensor, chunk_size: int = 256, group: Any = None,
    op: str = "avg", *, nonfinite: Tensor | None = None, validate: str = "first",
    timeout: float | None = None, async_op: Literal[True],
) -> Work[Tensor]: ...
# fmt: on
def packed_all_reduce_(
    grad: Tensor,
    err: Tensor,
    server_err: Tensor,
    chunk_size: int = 256,
    group: Any = None,
    op: str = "avg",
    *,
    nonfinite: Tensor | None = None,
    validate: str = "first",
    timeout: float | None = None,
    async_op: bool = False,
) -> Tensor | Work[Tensor]:
    """The 1-bit all-reduce: signs and a scale a chunk in both phases, with worker and server residuals.

    Sends about numel / 4 bytes a rank, whatever the number of ranks.
    Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
    Convergence Speed" (ICML 2021), section 5, with one scale a chunk.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape; overwritten by the decoded average.
        err: fp32, numel elements; this rank's residual, overwritten.
        server_err: fp32, `gck.shard_numel(numel, chunk_size, world_size)` elements; the
            residual of the shard that this rank owns, overwritten.
        chunk_size: elements a scale, a power of two in [32, 8192].
        group, op, validate, timeout, async_op: as for `all_reduce_`.
        nonfinite: (1,) int64; increased by the residual entries cleared because not finite.

    Returns:
        grad; a `Work` whose `wait` returns it where async_op is true.

    Raises:
        Those of `all_reduce_`; grad, err, server_err and nonfinite are as they were.
    """
    function = "packed_all_reduce_"
    # By name: this function is the sign format's own, and collectives do not import kernels.
    compressor: Compressor = compressor_class("sign")(chunk_size=chunk_size)
    transport = resolve(group, timeout)
    checks.check_grad(function, grad)
    checks.check_fp32(function, "err", err)
    checks.check_same(function, "err", err, "grad", grad)
    checks.check_fp32(function, "server_err", server_err)
    checks.check_device(function, "server_err", server_err, "grad", grad)
    checks.check_nonfinite(function, nonfinite, grad)
    shard = shard_numel(grad.numel(), chunk_size, transport.world_size)
    if server_err.numel() != shard:
        raise ShapeMismatchError(
            f"{function}: server_err must have {shard} elements (shard_numel({grad.numel()}, {chunk_size}, "
            f"{transport.world_size})), got {server_err.numel()}"
        )
    state = ErrorFeedback()
    state.worker, state.server, state.nonfinite = err.view(-1), server_err.view(-1), nonfinite
    state.binding = ServerBinding(transport.rank, transport.world_size, chunk_size)
    run = prepare(function, [grad], [state], compressor, transport, op, "two_phase", validate, async_op)
    return _perform(function, transport, run, grad, [state], grad, async_op)


def check_algorithm(function: str, compressor: object, algorithm: object) -> None:
    """Raises unless `compressor` is one and can run on `algorithm`.

    Raises:
        DtypeError: compressor is no Compressor.
        ArgumentError: algorithm is unknown, or not for this compressor.
    """
    if algorithm not in ALGORITHMS:
        names = ", ".join(f'"{name}"' for name in ALGORITHMS)
        raise ArgumentError(f"{function}: algorithm must be one of {names}, got {algorithm!r}")
    if not isinstance(compressor, Compressor):
        raise DtypeError(f"{function}: compressor must be a Compressor, got {type(compressor).__name__}")
    if algorithm == "two_phase" and compressor.shard_unit is None:
        raise ArgumentError(
            f'{function}: algorithm "two_phase" needs a compressor that works on chunks, got {compressor}'
        )


def prepare(
    function: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    compressor: Compressor,
    transport: Transport,
    op: str = "avg",
    algorithm: str = "auto",
    validate: str = "first",
    async_op: bool = False,
) -> Callable[[], None]:
    """Checks a call and returns the rest of it, to be run when the call has the group's turn."""
    check_async_op(function, async_op)
    check_validate(function, validate)
    _check(function, grads, states, compressor, op, algorithm)
    if not grads:
        return lambda: None
    numels = tuple(grad.numel() for grad in grads)
    plan = _plan(compressor, numels, transport.world_size, algorithm)
    _check_states(states, numels, compressor, transport)
    name = next(iter(plan)) if len(plan) == 1 else "mixed"
    signature = Signature(name, describe(compressor), tuple(g.dtype for g in grads), numels, op)
    return partial(_all_reduce, function, grads, states, compressor, transport, op, plan, signature, validate)


def _all_reduce(
    function: str,
    grads: Sequence[Tensor],
    kept: Sequence[ErrorFeedback | None],
    compressor: Compressor,
    transport: Transport,
    op: str,
    plan: dict[str, list[int]],
    signature: Signature,
    validate: str,
) -> None:
    """Agrees with the other ranks, reduces, and writes only when everything succeeded."""
    # The states once more: what was in flight may have used them since `prepare`.
    bindings = _check_states(kept, signature.numels, compressor, transport)
    agree(transport, function, signature, validate)

    saved = [None if state is None else state.snapshot() for state in kept]
    flat = [grad.detach().view(-1) for grad in grads]
    written: list[tuple[Tensor, Tensor]] = []
    try:
        results: list[tuple[Tensor, Tensor]] = []
        for chosen, members in plan.items():
            some, some_states = [flat[i] for i in members], [kept[i] for i in members]
            if chosen == "dense":
                reduced = dense(transport, compressor, some, some_states, op)
            else:
                bound = [bindings[i] for i in members]
                reduced = _compressed(transport, compressor, chosen, some, some_states, bound, op)
            results += zip(some, reduced, strict=True)
        transport.synchronize()
        # Copies of all of them first: an interrupt may come between two writes, or within one.
        written = [(grad, grad.clone()) for grad, _ in results]
        for grad, result in results:
            grad.copy_(result)
    except BaseException:
        for grad, copy in written:
            grad.copy_(copy)
        for state, snapshot in zip(kept, saved, strict=True):
            if state is not None and snapshot is not None:
                state.restore(snapshot)
        raise


def _perform(
    function: str,
    transport: Transport,
    run: Callable[[], None],
    grad: Tensor | None,
    states: Sequence[ErrorFeedback | None],
    result: T,
    async_op: bool,
) -> T | Work[T]:
    """Runs what `prepare` returned, in its turn or later, for `result`."""

    def run_for_result() -> T:
        run()
        return result

    def made() -> list[Tensor]:
        held = [(s.worker, s.server, s.nonfinite) for s in states if s is not None]
        return [buffer for buffers in held for buffer in buffers if buffer is not None]

    device = torch.device("cpu") if grad is None else grad.device
    return perform(transport, function, run_for_result, device, async_op, made)


def _plan(
    compressor: Compressor, numels: Sequence[int], world_size: int, algorithm: str
) -> dict[str, list[int]]:
    """Which tensors go by which algorithm, in the same order on all ranks; options that do not fit a
    size raise here, before anything is sent."""
    if algorithm != "auto":
        for numel in numels if algorithm != "dense" else ():
            compressor.layout(numel)
        return {algorithm: list(range(len(numels)))}
    # Each tensor by itself: whether and how it is compressed must not depend on what it shares a message
    # with, since DDP rebuilds its buckets after the first step, and again after a restart.
    plan: dict[str, list[int]] = {}
    for i, numel in enumerate(numels):
        plan.setdefault(choose_algorithm(compressor, [numel], world_size), []).append(i)
    return plan


def _compressed(
    transport: Transport,
    compressor: Compressor,
    algorithm: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    bindings: Sequence[tuple[int, ServerBinding] | None],
    op: str,
) -> list[Tensor]:
    pairs = list(zip(grads, states, strict=True))
    errs = [None if state is None else state.worker_for(grad) for grad, state in pairs]
    counters = [None if state is None else state.nonfinite_for(grad.device) for grad, state in pairs]
    unit = compressor.shard_unit
    if algorithm == "one_phase" or unit is None:
        return one_phase(transport, compressor, grads, errs, counters, op)
    servers = [
        None if state is None or bound is None else state.server_for(bound[0], grad.device, bound[1])
        for (grad, state), bound in zip(pairs, bindings, strict=True)
    ]
    return two_phase(transport, compressor, unit, grads, errs, servers, counters, op)


def _check(
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
        memory[f"grads[{i}]"] = grad
        if state is None:
            continue
        if not isinstance(state, ErrorFeedback):
            raise DtypeError(f"{function}: state must be an ErrorFeedback, got {type(state).__name__}")
        if state.worker is not None:
            memory[f"the worker residual of grads[{i}]"] = state.worker
        if state.server is not None:
            memory[f"the server residual of grads[{i}]"] = state.server
    held = [id(state) for state in states if state is not None]
    if len(set(held)) != len(held):
        raise ArgumentError(f"{function}: two gradients must not share one ErrorFeedback")
    checks.check_no_overlap(function, **memory)


def _check_states(
    states: Sequence[ErrorFeedback | None],
    numels: Sequence[int],
    compressor: Compressor,
    transport: Transport,
) -> list[tuple[int, ServerBinding] | None]:
    """Size and binding of each server residual; raises where a state belongs to something else."""
    bindings: list[tuple[int, ServerBinding] | None] = []
    for state, numel in zip(states, numels, strict=True):
        if state is None:
            bindings.append(None)
            continue
        state.check_numel(numel)
        unit = compressor.shard_unit if compressor.shard_unit is not None else _unit(state)
        if unit is None:
            bindings.append(None)
            continue
        shard = shard_numel(numel, unit, transport.world_size)
        bound = ServerBinding(transport.rank, transport.world_size, unit)
        state.check_server(shard, bound)
        bindings.append((shard, bound))
    return bindings


def _unit(state: ErrorFeedback) -> int | None:
    return None if state.binding is None else state.binding.unit
