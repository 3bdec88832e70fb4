"""One phase: every rank receives every payload and decodes all of them, in rank order.

Receives (W - 1) payloads a rank: right for small worlds, and for compressors whose vector cannot be
cut into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from gck.collectives.failure import give_up
from gck.collectives.handshake import Signature, agree, check_validate
from gck.collectives.pieces import Decoding, Keep, Piece, Slice, cut, gathered
from gck.collectives.scratch import Scratch
from gck.collectives.transports import Started, Transport, await_peers, resolve
from gck.collectives.undo import Undo
from gck.collectives.work import Work, perform
from gck.compressor import Compressor, compressor_at, decompress_mean_, preview_
from gck.errors import ArgumentError
from gck.kernels.common import checks
from gck.values import check_flags, shown
from gck.wire import body_of, payloads_of

__all__ = ["one_phase", "sparse_all_gather"]

P = TypeVar("P", bound=tuple[Any, ...])


# fmt: off
@overload
def sparse_all_gather(
    payload: P, group: Any = None, *, validate: str = "first", timeout: float | None = None,
    async_op: Literal[False] = False,
) -> list[P]: ...
@overload
def sparse_all_gather(
    payload: P, group: Any = None, *, validate: str = "first", timeout: float | None = None,
    async_op: Literal[True],
) -> Work[list[P]]: ...
# fmt: on
def sparse_all_gather(
    payload: P,
    group: Any = None,
    *,
    validate: str = "first",
    timeout: float | None = None,
    async_op: bool = False,
) -> list[P] | Work[list[P]]:
    """Every rank's payload, in rank order, this rank's own included.

    Payloads of all ranks must have the same type, dtypes and lengths: the same compressor on vectors of
    the same size makes them so. One message a rank, of `payload.nbytes` bytes; no size exchange.
    Source: the sparse all-gather of Lin et al., "Deep Gradient Compression" (ICLR 2018).

    Args:
        payload: any payload NamedTuple of flat tensors and ints; read only.
        group: None (WORLD), a torch ProcessGroup, an `NcclCommunicator` or a member of a `SimulatedGroup`.
        validate: when ranks compare what they call: "first", "always" or "off"; see `gck.all_reduce_`.
        timeout: seconds that each wait may take. Default: the group's own.
        async_op: return a handle at once; see `gck.all_reduce_`. The payload must be left alone meanwhile.

    Returns:
        world_size payloads whose tensors are views of one new buffer on the payload's device; a `Work` whose
        `wait` returns them where async_op is true.

    Raises:
        ArgumentError: payload is no NamedTuple of tensors, or validate is unknown.
        CollectiveMismatchError: ranks hold payloads of different layouts; on all ranks, group usable.
        PeerLostError, CollectiveTimeoutError: the group is unusable afterwards.
        GroupUnusableError: an earlier failure spoilt the group.
    """
    names = getattr(payload, "_fields", None)
    if not isinstance(payload, tuple) or names is None:
        raise ArgumentError(f"sparse_all_gather: payload must be a payload NamedTuple, got {shown(payload)}")
    tensors = [value for value in payload if isinstance(value, Tensor)]
    if not tensors:
        raise ArgumentError(
            f"sparse_all_gather: {type(payload).__name__} holds no tensors, got {shown(payload)}"
        )
    for name, value in zip(names, payload, strict=True):
        if isinstance(value, Tensor):
            checks.check_tensor("sparse_all_gather", name, value)
            checks.check_device("sparse_all_gather", name, value, "the first tensor", tensors[0])
    check_flags("sparse_all_gather", async_op=async_op)
    check_validate("sparse_all_gather", validate)
    transport = resolve(group, timeout)
    options = ", ".join(f"{n}={v}" for n, v in zip(names, payload, strict=True) if not isinstance(v, Tensor))
    signature = Signature(
        "gather",
        f"{type(payload).__name__}({options})",
        tuple(tensor.dtype for tensor in tensors),
        tuple(tensor.numel() for tensor in tensors),
    )

    def run() -> list[P]:
        try:
            agree(transport, "sparse_all_gather", signature, validate)
            # A transport that can packs what lies apart where it is received.
            gather = getattr(transport, "all_gather_bodies", None)
            rows = transport.all_gather_bytes(body_of(*tensors)) if gather is None else gather(tensors)
            transport.synchronize()
            return payloads_of(payload, rows)
        except BaseException as error:
            give_up(transport, "sparse_all_gather", error)
            raise

    return perform(transport, "sparse_all_gather", run, tensors[0].device, async_op)


def one_phase(
    transport: Transport,
    compressor: Compressor,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor | None],
    counters: Sequence[Tensor | None],
    undo: Sequence[Undo],
    results: Sequence[Tensor],
    divisor: int,
    piece_numel: int = 0,
    *,
    memory: Scratch,
    keep: Keep | None = None,
) -> Callable[[], None]:
    """Reduces by gathering payloads. All tensors travel in one message, or in one a piece.

    Steps:
        1. Compress every gradient with its worker residual, which becomes what was left out.
        2. All-gather the bodies. Where links are slow (piece_numel) and the compressor can say what it will
           send without it, residuals are updated from here on.
        3. Decode and add in rank order, this rank's own message too; divide once by `divisor`, which is the
           number of ranks, of all tiers, for a mean.

    Args:
        undo: whose `worker` is told before any of its elements change.
        results: (numel,) fp32 each, overwritten. The gradients themselves where there is a `keep`.
        piece_numel: elements a piece of a compressor that works on chunks; 0: one piece, and no hurry.
        memory: where what is sent is made.
        keep: see `gck.collectives.pieces.Decoding`.

    Returns:
        what is left of step 3, when nothing can fail any more; it may be called more than once.
    """
    numels, unit = [grad.numel() for grad in grads], compressor.shard_unit
    whole = [[Slice(i, 0, numel) for i, numel in enumerate(numels)]]
    pieces = cut(numels, unit, 1, piece_numel) if piece_numel and unit is not None else whole

    ahead = piece_numel and transport.world_size > 1 and hasattr(transport, "start_all_gather_bytes")
    late: list[Callable[[], None]] = []

    @cache
    def body_nbytes(numel: int) -> int:
        return compressor.layout(numel).nbytes

    def sizes(piece: Piece) -> list[int]:
        return [body_nbytes(part.numel) for part in piece]

    def compress(piece: Piece) -> Tensor:
        send = memory.zeros((1, sum(sizes(piece))), torch.uint8, grads[0].device)
        for (i, start, numel), body in zip(piece, send.split(sizes(piece), 1), strict=True):
            if not numel:
                continue
            err, end = errs[i], start + numel
            part = compressor if start == 0 else compressor_at(compressor, start)
            if part is None:
                raise ArgumentError(f"one_phase: {compressor} cannot be cut into pieces")
            given = part, grads[i][start:end], None if err is None else err[start:end]
            if ahead and preview_(*given, body):
                again = memory.zeros((1, body.shape[1]), torch.uint8, body.device)
                late.append(partial(update, i, start, end, *given, again))
            else:
                update(i, start, end, *given, body)
        return send[0]

    def nbytes(piece: Piece) -> int:
        return sum(sizes(piece))

    def update(
        i: int, start: int, end: int, part: Compressor, grad: Tensor, err: Tensor | None, body: Tensor
    ) -> None:
        undo[i].worker.keep(start, end)
        part.compress_(grad, err, body, nonfinite=counters[i])

    def catch_up(started: Started) -> None:
        if late:
            await_peers(started)
        for each in late:
            each()
        late.clear()

    def decode(piece: Piece, rows: Tensor) -> None:
        for (i, start, numel), bodies in zip(piece, rows.split(sizes(piece), 1), strict=True):
            if numel:
                decompress_mean_(compressor, results[i][start : start + numel], bodies, divisor)

    def places(piece: Piece) -> Iterator[tuple[int, int, int]]:
        return ((i, start, start + numel) for i, start, numel in piece)

    decoding = Decoding(decode, places, results, keep)
    asks = ahead and all(grad.device.type == "cpu" for grad in grads)
    gathered(transport, pieces, compress, catch_up, decoding, nbytes if asks else None)
    return decoding.finish
