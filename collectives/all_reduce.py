"""The public all-reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from gck.collectives.hierarchical import HierarchicalGroup
from gck.collectives.reduction import prepare
from gck.collectives.transports import Transport, resolve
from gck.collectives.work import Work, perform
from gck.compressor import Compressor, compressor_class, shard_numel
from gck.error_feedback import ErrorFeedback, ServerBinding
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from gck.interop import borrowed
from gck.kernels.common import checks
from gck.ops.registration import Array
from gck.values import plain_int, shown

__all__ = ["all_reduce_", "all_reduce_many_", "packed_all_reduce_"]

T = TypeVar("T")
A = TypeVar("A", bound=Array)


# fmt: off
@overload
def all_reduce_(
    grad: A, state: ErrorFeedback | None, compressor: Compressor, group: Any = None, op: str = "avg",
    algorithm: str = "auto", *, piece_numel: int | None = None, validate: str = "first",
    checksum: bool = False, timeout: float | None = None,
    async_op: Literal[False] = False,
) -> A: ...
@overload
def all_reduce_(
    grad: Tensor, state: ErrorFeedback | None, compressor: Compressor, group: Any = None, op: str = "avg",
    algorithm: str = "auto", *, piece_numel: int | None = None, validate: str = "first",
    checksum: bool = False, timeout: float | None = None,
    async_op: Literal[True],
) -> Work[Tensor]: ...
# fmt: on
def all_reduce_(
    grad: Any,
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
    async_op: bool = False,
) -> Any:
    """Averages a gradient over the group through a compressor, with error feedback.

    Every rank ends with the same bits. What the messages left out stays in `state` and is added to the
    next gradient, so nothing is lost, only late. Sums are taken in fp32 and rounded to the gradient's
    dtype once. The compressed algorithms add in rank order. The order of the dense one is the
    backend's: from three ranks on, the last bits may depend on the backend and on the message's size.
    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"
    (ICML 2019), Algorithm 2; the two-phase algorithm is that of "1-bit Adam" (ICML 2021).

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape and number of elements; overwritten by the
            decoded average. An array of CuPy or NumPy, or what else speaks DLPack, is taken where it lies,
            CuPy's on CuPy's current stream.
        state: the residuals of this tensor on this rank, updated; None for no error feedback.
        compressor: how to compress; the same on all ranks.
        group: None (WORLD), a torch ProcessGroup, an `NcclCommunicator` or a member of a
            `SimulatedGroup`.
        op: "avg" or "sum".
        algorithm: "one_phase" gathers payloads, "two_phase" shards the vector (chunked compressors only),
            "seeded" adds up values whose places all ranks share (random-k only), "factored" the two factors
            of a matrix, one after the other (low rank only, which looks at grad's shape), "dense" sends fp32
            uncompressed, residual included, and leaves none; "auto" takes the one that sends least, see
            `gck.collectives.choose_algorithm`. On a `HierarchicalGroup`, what happens across nodes.
        piece_numel: elements of a piece of one or two phases: while one piece is on the wire, others are
            compressed and decoded, with the same bits as without. None or 0: all at once. The same on all
            ranks; may change from call to call. `gck.collectives.choose_piece_numel` says what suits a
            link. A compressor without chunks, or without a method `at` (see
            `gck.compressor.compressor_at`), goes all at once; with any number but 0 top-k sends before it
            updates its residual.
        validate: when ranks compare what they call: "first" time they meet a configuration, "always" or
            "off". The same on all ranks. With "first", ranks that later mix up configurations which they
            have met are not noticed: gloo may end the process, or a payload be refused as corrupt; take
            "always" (a small message more a call) where configurations change during training.
        checksum: every message carries a checksum, and ranks tell one another whether theirs were right: 16
            bytes a message, and one more small message a phase. Without it a bit that flips on its way may
            make ranks differ. Of dense sums, the results are compared.
        timeout: seconds that each wait may take. Default: the group's own.
        async_op: return a handle at once, and reduce on another thread, in the order of gck's calls on the
            group. Errors of arguments are raised here, all others by the handle's `wait`. Until then grad,
            a tensor, and state must be left alone, and be with one group; and torch.distributed must not be
            called on that group, of whose order gck knows nothing: ranks would wait for each other until
            the timeout.

    Returns:
        grad; a `Work` whose `wait` returns it where async_op is true.

    Raises:
        ArgumentError: an argument is out of range or does not fit another.
        StateMismatchError: state belongs to another tensor, rank, world size or topology.
        CollectiveMismatchError: ranks call different things; on all ranks, and the group stays usable.
        CorruptPayloadError: a message, or a handshake, was damaged; with `checksum` on all ranks, and the
            group stays usable.
        BackendUnavailableError: `checksum`, and xxhash is not installed.
        PeerLostError, CollectiveTimeoutError: a peer died, failed or did not answer; the group is unusable.
        GroupUnusableError: an earlier failure spoilt the group.
        MemoryError, and what else a compressor raises: on this rank alone; the group is unusable.

        Whatever is raised, grad and state are as they were; only Ctrl-C (KeyboardInterrupt) in the moment in
        which results are written lets that come to its end first: all or nothing. Ctrl-C before that gives
        the group up, since peers may wait for what will not come.

        Arguments are checked before ranks exchange anything: a check that fails on one rank only (a gradient
        that is not contiguous there, say) raises there, while its peers wait for it until their timeout,
        which spoils the group for them. The rank that raised must not go on with the group either: its next
        message would be taken for the one that is missing.
    """
    if _is_array(grad):
        with _borrowed("all_reduce_", async_op, grad=grad) as [tensor]:
            all_reduce_(
                tensor,
                state,
                compressor,
                group,
                op,
                algorithm,
                piece_numel=piece_numel,
                validate=validate,
                checksum=checksum,
                timeout=timeout,
            )
        return grad
    states = [state]
    transport = resolve(group, timeout)
    options = validate, async_op, piece_numel, checksum
    run = prepare("all_reduce_", [grad], states, compressor, transport, op, algorithm, *options)
    return _perform("all_reduce_", transport, run, grad, states, grad, async_op)


# fmt: off
@overload
def all_reduce_many_(
    grads: Sequence[Array], states: Sequence[ErrorFeedback | None] | None, compressor: Compressor,
    group: Any = None, op: str = "avg", algorithm: str = "auto", *, piece_numel: int | None = None,
    validate: str = "first", checksum: bool = False, timeout: float | None = None,
    async_op: Literal[False] = False,
) -> None: ...
@overload
def all_reduce_many_(
    grads: Sequence[Tensor], states: Sequence[ErrorFeedback | None] | None, compressor: Compressor,
    group: Any = None, op: str = "avg", algorithm: str = "auto", *, piece_numel: int | None = None,
    validate: str = "first", checksum: bool = False, timeout: float | None = None, async_op: Literal[True],
) -> Work[None]: ...
# fmt: on
def all_reduce_many_(
    grads: Sequence[Any],
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
    async_op: bool = False,
) -> Work[None] | None:
    """`all_reduce_` of several tensors with one message a phase; all on one device.

    With "auto" each tensor takes the algorithm that it would take alone, and tensors of one algorithm
    share messages. Tensors that are compressed get the bits that they would get alone, however they are
    grouped. Dense ones get the same bits on every rank, but from three ranks on these may depend on the
    grouping: the backend adds in an order that follows from the place in the message, as a ring does
    whose chunks end elsewhere.

    Args:
        grads: tensors or arrays as for `all_reduce_`; must not overlap.
        states: one `ErrorFeedback` (or None) a tensor; None: no error feedback at all.
        piece_numel: elements of a piece, of all tensors that go by one algorithm, one after the other.

    Other arguments and errors are those of `all_reduce_`; an error leaves every tensor as it was.
    """
    function, grads = "all_reduce_many_", list(grads)
    if isinstance(states, ErrorFeedback):
        raise DtypeError(
            f"{function}: states must be a sequence of one for each gradient, got {shown(states)}"
        )
    if any(map(_is_array, grads)):
        with _borrowed(
            function, async_op, **{f"grads[{i}]": grad for i, grad in enumerate(grads)}
        ) as tensors:
            all_reduce_many_(
                tensors,
                states,
                compressor,
                group,
                op,
                algorithm,
                piece_numel=piece_numel,
                validate=validate,
                checksum=checksum,
                timeout=timeout,
            )
        return None
    transport = resolve(group, timeout)
    kept = [None] * len(grads) if states is None else list(states)
    options = validate, async_op, piece_numel, checksum
    run = prepare(function, grads, kept, compressor, transport, op, algorithm, *options)
    return _perform(function, transport, run, grads[0] if grads else None, kept, None, async_op)


# fmt: off
@overload
def packed_all_reduce_(
    grad: A, err: Array, server_err: Array, chunk_size: int = 256, group: Any = None,
    op: str = "avg", *, nonfinite: Tensor | None = None, validate: str = "first", checksum: bool = False,
    timeout: float | None = None, async_op: Literal[False] = False,
) -> A: ...
@overload
def packed_all_reduce_(
    grad: Tensor, err: Tensor, server_err: Tensor, chunk_size: int = 256, group: Any = None,
    op: str = "avg", *, nonfinite: Tensor | None = None, validate: str = "first", checksum: bool = False,
    timeout: float | None = None, async_op: Literal[True],
) -> Work[Tensor]: ...
# fmt: on
def packed_all_reduce_(
    grad: Any,
    err: Any,
    server_err: Any,
    chunk_size: int = 256,
    group: Any = None,
    op: str = "avg",
    *,
    nonfinite: Tensor | None = None,
    validate: str = "first",
    checksum: bool = False,
    timeout: float | None = None,
    async_op: bool = False,
) -> Any:
    """The 1-bit all-reduce: signs and a scale a chunk in both phases, with worker and server residuals.

    Sends about numel / 4 bytes a rank, whatever the number of ranks.
    Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
    Convergence Speed" (ICML 2021), section 5, with one scale a chunk.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape; overwritten by the decoded average.
        err: fp32, numel elements; this rank's residual, overwritten.
        server_err: fp32, `gck.shard_numel(numel, chunk_size, world_size)` elements; the
            residual of the shard that this rank owns, overwritten. All three may be arrays.
        chunk_size: elements a scale, a power of two in [32, 8192].
        group, op, validate, checksum, timeout, async_op: as for `all_reduce_`.
        nonfinite: (1,) int64; increased by the residual entries cleared because not finite.

    Returns:
        grad; a `Work` whose `wait` returns it where async_op is true.

    Raises:
        Those of `all_reduce_`; grad, err, server_err and nonfinite are as they were.
    """
    function = "packed_all_reduce_"
    if _is_array(grad):
        with _borrowed(function, async_op, grad=grad, err=err, server_err=server_err) as tensors:
            grad_tensor, err_tensor, server_tensor = tensors
            packed_all_reduce_(
                grad_tensor,
                err_tensor,
                server_tensor,
                chunk_size,
                group,
                op,
                nonfinite=nonfinite,
                validate=validate,
                checksum=checksum,
                timeout=timeout,
            )
        return grad
    chunk_size = plain_int(chunk_size)
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
    options = validate, async_op, None, checksum
    run = prepare(function, [grad], [state], compressor, transport, op, "two_phase", *options)
    return _perform(function, transport, run, grad, [state], grad, async_op)


def _is_array(grad: object) -> bool:
    """Whether it is another library's array, and no tensor."""
    return not isinstance(grad, Tensor) and hasattr(grad, "__dlpack__")


def _borrowed(function: str, async_op: object, **arrays: Any) -> AbstractContextManager[list[Tensor]]:
    """The arrays as tensors that will be written to, see `gck.interop.borrowed`."""
    if async_op:
        other = next(array for array in arrays.values() if _is_array(array))
        raise ArgumentError(f"{function}: async_op=True takes tensors, got {shown(other)}")
    return borrowed(function, tuple(arrays), **arrays)


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
