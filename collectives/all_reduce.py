"""The public all-reduces: checks, the choice of an algorithm, and all-or-nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from gck.collectives.all_gather import one_phase
from gck.collectives.cost import choose_algorithm
from gck.collectives.dense import dense
from gck.collectives.handshake import Signature, agree, describe
from gck.collectives.hierarchical import HierarchicalGroup, all_gather, bindings_of, cut, reduce_scatter
from gck.collectives.pieces import check_piece_numel, piece_numel_of
from gck.collectives.transports import Transport, resolve
from gck.collectives.transports.checked import Checked
from gck.collectives.two_phase import Shards, two_phase
from gck.compressor import Compressor, compressor_class, shard_numel
from gck.error_feedback import ErrorFeedback, ServerBinding, ShardBinding
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks

__all__ = ["all_reduce_", "all_reduce_many_", "packed_all_reduce_"]

OPS = ("avg", "sum")
ALGORITHMS = ("auto", "one_phase", "two_phase", "dense")


def all_reduce_(
    grad: Tensor,
    state: ErrorFeedback | None,
    compressor: Compressor,
    group: Any = None,
    op: str = "avg",
    algorithm: str = "auto",
    *,
    piece_numel: int | None = None,
    validate: str = "first",
    checksum: bool = False,
    timeout: float | None = None,
) -> Tensor:
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
        group: None (WORLD), a torch ProcessGroup, an `NcclCommunicator`, a member of a
            `SimulatedGroup`, or a `HierarchicalGroup`: then the gradient is added up inside nodes, and what
            follows happens across nodes, on this rank's shard, as do residuals.
        op: "avg" or "sum".
        algorithm: "one_phase" gathers payloads, "two_phase" shards the vector (chunked compressors
            only), "dense" sends fp32 uncompressed, residual included, and leaves none; "auto" takes
            the one that sends least, see `gck.collectives.choose_algorithm`. On a `HierarchicalGroup`, what
            happens across nodes.
        piece_numel: elements of a piece of the two-phase algorithm: while one piece is on the wire, the next
            is compressed and the last decoded, with the same bits as without. 0: all at once. The same on
            all ranks; may change from call to call. Default: `gck.collectives.choose_piece_numel`. A
            compressor without a method `at` (see `gck.compressor.compressor_at`) goes all at once.
        validate: when ranks compare what they call: "first" time they meet a configuration, "always" or
            "off". The same on all ranks. With "first", ranks that later mix up configurations which they
            have met are not noticed: gloo may end the process, or a payload be refused as corrupt; take
            "always" (a small message more a call) where configurations change during training.
        checksum: every message carries a checksum, and ranks tell one another whether theirs were right: 16
            bytes a message, and one more small message a phase. Without it a bit that flips on its way may
            make ranks differ. Of dense sums, the results are compared.
        timeout: seconds that each wait may take. Default: the group's own.

    Returns:
        grad.

    Raises:
        ArgumentError: an argument is out of range or does not fit another.
        StateMismatchError: state belongs to another tensor, rank, world size or topology.
        CollectiveMismatchError: ranks call different things; on all ranks, and the group stays usable.
        CorruptPayloadError: a message was damaged; with `checksum` on all ranks, and the group stays usable.
        BackendUnavailableError: `checksum`, and xxhash is not installed.
        PeerLostError, CollectiveTimeoutError: a peer died or did not answer; the group is unusable.
        GroupUnusableError: an earlier failure spoilt the group.

        Whatever is raised, grad and state are as they were. Arguments are checked before ranks
        exchange anything: a check that fails on one rank only (a gradient that is not contiguous there,
        say) raises there, while its peers wait for it until their timeout, which spoils the group for
        them. The rank that raised must not go on with the group either: its next message would be taken
        for the one that is missing.
    """
    states = None if state is None else [state]
    transport = resolve(group, timeout)
    options = validate, piece_numel, checksum
    _all_reduce("all_reduce_", [grad], states, compressor, transport, op, algorithm, *options)
    return grad


def all_reduce_many_(
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None] | None,
    compressor: Compressor,
    group: Any = None,
    op: str = "avg",
    algorithm: str = "auto",
    *,
    piece_numel: int | None = None,
    validate: str = "first",
    checksum: bool = False,
    timeout: float | None = None,
) -> None:
    """`all_reduce_` of several tensors with one message a phase; all on one device.

    With "auto" each tensor takes the algorithm that it would take alone, and tensors of one algorithm
    share messages. Tensors that are compressed get the bits that they would get alone, however they are
    grouped. Dense ones get the same bits on every rank, but from three ranks on these may depend on the
    grouping: the backend adds in an order that follows from the place in the message, as a ring does
    whose chunks end elsewhere.

    Args:
        grads: tensors as for `all_reduce_`; must not overlap.
        states: one `ErrorFeedback` (or None) a tensor; None: no error feedback at all.
        piece_numel: elements of a piece, of all tensors that go by two phases, one after the other.

    Other arguments and errors are those of `all_reduce_`; an error leaves every tensor as it was.
    """
    transport = resolve(group, timeout)
    options = validate, piece_numel, checksum
    _all_reduce("all_reduce_many_", grads, states, compressor, transport, op, algorithm, *options)


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
    checksum: bool = False,
    timeout: float | None = None,
) -> Tensor:
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
        group, op, validate, checksum, timeout: as for `all_reduce_`.
        nonfinite: (1,) int64; increased by the residual entries cleared because not finite.

    Returns:
        grad.

    Raises:
        Those of `all_reduce_`; grad, err, server_err and nonfinite are as they were.
    """
    function = "packed_all_reduce_"
    # By name: this function is the sign format's own, and collectives do not import kernels.
    compressor: Compressor = compressor_class("sign")(chunk_size=chunk_size)
    transport = resolve(group, timeout)
    if isinstance(transport, HierarchicalGroup):
        raise ArgumentError(f"{function}: group must be flat, got {transport}; all_reduce_ takes it")
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
    _all_reduce(function, [grad], [state], compressor, transport, op, "two_phase", validate, None, checksum)
    return grad


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


def _all_reduce(
    function: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None] | None,
    compressor: Compressor,
    transport: Transport,
    op: str,
    algorithm: str,
    validate: str,
    piece_numel: int | None,
    checksum: bool,
) -> None:
    """Checks, agrees with the other ranks, reduces, and writes only when everything succeeded."""
    kept: Sequence[ErrorFeedback | None] = [None] * len(grads) if states is None else states
    _check(function, grads, kept, compressor, op, algorithm)
    check_piece_numel(function, piece_numel)
    if not grads:
        return
    numels = tuple(grad.numel() for grad in grads)
    tiers = transport if isinstance(transport, HierarchicalGroup) else None
    # Payloads travel across `tier`; `cuts` is how the ranks of a node share each tensor.
    tier, local_world_size = (transport, 1) if tiers is None else (tiers.cross, tiers.local.world_size)
    cuts = cut(numels, compressor.shard_unit, local_world_size)
    plan = _plan(compressor, cuts, local_world_size, tier.world_size, algorithm)
    shards = bindings_of(tiers, cuts)
    bindings = _check_states(kept, cuts, shards, compressor, tier)
    together = [cuts[i].numel for i in plan.get("two_phase", ())]
    pieces = piece_numel_of(compressor, together, tier.world_size, grads[0].device.type, piece_numel)
    name = next(iter(plan)) if len(plan) == 1 else "mixed"
    # Messages of pieces and with checksums are others: what ranks compare of the compressor says so.
    text = describe(compressor) + (f" in pieces of {pieces} elements" if pieces else "")
    text += " with checksums" if checksum else ""
    signature = Signature(name, text, tuple(g.dtype for g in grads), numels, op)
    agree(transport, function, signature, validate)
    local = transport if tiers is None else tiers.local
    if checksum:
        sequence = transport.calls.sequence
        tier, local = Checked(tier, sequence), Checked(local, sequence)

    saved = [None if state is None else state.snapshot() for state in kept]
    flat = [grad.detach().view(-1) for grad in grads]
    divisor = transport.world_size if op == "avg" else 1
    written: list[tuple[Tensor, Tensor]] = []
    try:
        if tiers is None:
            keep = partial(_keep, written, flat)
            results = _reduced(tier, compressor, plan, flat, kept, shards, bindings, divisor, pieces, keep)
        else:
            with tiers.both_or_none():
                parts = reduce_scatter(local, flat, cuts)
                # The ranks across nodes hold parts of one size: those of none have nothing to send.
                held = {chosen: [i for i in those if parts[i].numel()] for chosen, those in plan.items()}
                parts = _reduced(tier, compressor, held, parts, kept, shards, bindings, divisor, pieces)
                results = all_gather(local, parts, [grad.dtype for grad in grads], cuts)
        transport.synchronize()
        # Copies of all of them first: an interrupt may come between two writes, or within one.
        if not written:
            _keep(written, flat)
        for grad, result in zip(flat, results, strict=True):
            grad.copy_(result)
    except BaseException:
        for grad, copy in written:
            grad.copy_(copy)
        for state, snapshot in zip(kept, saved, strict=True):
            if state is not None and snapshot is not None:
                state.restore(snapshot)
        raise


def _keep(copies: list[tuple[Tensor, Tensor]], grads: Sequence[Tensor]) -> None:
    """Adds copies to go back to; two phases have it done while the link is busy."""
    copies += [(grad, grad.clone()) for grad in grads]


def _plan(
    compressor: Compressor, cuts: Sequence[Shards], local_world_size: int, world_size: int, algorithm: str
) -> dict[str, list[int]]:
    """Which tensors go by which algorithm, in the same order on all ranks; options that do not fit a
    size raise here, on all ranks and before anything is sent."""
    for shards in cuts if algorithm != "dense" else ():
        for numel in {shards.valid(rank) for rank in range(local_world_size)}:
            if numel or local_world_size == 1:
                compressor.layout(numel)
    if algorithm != "auto":
        return {algorithm: list(range(len(cuts)))}
    # Each tensor by itself: whether and how it is compressed must not depend on what it shares a message
    # with, since DDP rebuilds its buckets after the first step, and again after a restart.
    plan: dict[str, list[int]] = {}
    for i, shards in enumerate(cuts):
        plan.setdefault(choose_algorithm(compressor, [shards.numel], world_size), []).append(i)
    return plan


def _reduced(
    transport: Transport,
    compressor: Compressor,
    plan: dict[str, list[int]],
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    shards: Sequence[ShardBinding | None],
    bindings: Sequence[tuple[int, ServerBinding] | None],
    divisor: int,
    piece_numel: int,
    keep: Callable[[], None] | None = None,
) -> list[Tensor]:
    """The reduced `grads`, flat, in their order; those that are in no plan as they are."""
    results = list(grads)
    for chosen, members in plan.items():
        if not members:
            continue
        some, some_states = [grads[i] for i in members], [states[i] for i in members]
        if chosen == "dense":
            reduced = dense(transport, compressor, some, some_states, divisor)
        else:
            places = [(shards[i], bindings[i]) for i in members]
            reduced = _compressed(
                transport, compressor, chosen, some, some_states, places, divisor, piece_numel, keep
            )
        for i, result in zip(members, reduced, strict=True):
            results[i] = result
    return results


def _compressed(
    transport: Transport,
    compressor: Compressor,
    algorithm: str,
    grads: Sequence[Tensor],
    states: Sequence[ErrorFeedback | None],
    places: Sequence[tuple[ShardBinding | None, tuple[int, ServerBinding] | None]],
    divisor: int,
    piece_numel: int,
    keep: Callable[[], None] | None,
) -> list[Tensor]:
    held = list(zip(grads, states, places, strict=True))
    errs = [None if state is None else state.worker_for(grad, shard) for grad, state, (shard, _) in held]
    counters = [None if state is None else state.nonfinite_for(grad.device) for grad, state, _ in held]
    unit = compressor.shard_unit
    if algorithm == "one_phase" or unit is None:
        return one_phase(transport, compressor, grads, errs, counters, divisor)
    servers = [
        None if state is None or bound is None else state.server_for(bound[0], grad.device, bound[1])
        for grad, state, (_, bound) in held
    ]
    return two_phase(transport, compressor, unit, grads, errs, servers, counters, divisor, piece_numel, keep)


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
