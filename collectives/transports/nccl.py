"""NCCL as a transport, and NCCL's own operations on tensors, through `gck._C`.

Operations are ordered on torch's current stream, or one that is given, and return once the library has
taken them; `synchronize` waits, within the timeout, for what was started. A library that works on host
memory, as the tests' does, has moved the bytes when an operation returns.
"""

from __future__ import annotations

import copy
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from gck._native import load
from gck.collectives.transports import CallLog, check_timeout, resolve
from gck.collectives.transports.nccl_operations import Operations, Shared, Stream
from gck.collectives.transports.nccl_rendezvous import exchange_by_group, exchange_by_store, wheels
from gck.collectives.work.queue import TurnLimit
from gck.errors import ArgumentError, CollectiveError, GckError
from gck.kernels.common import checks
from gck.values import plain_int, shown
from gck.wire import body_in_place, layout_of, payloads_of

__all__ = ["NcclCommunicator"]

P = TypeVar("P", bound=tuple[Any, ...])

LEAVE = 2.0  # seconds that closing may take where nobody asked for it


class NcclCommunicator(Operations):
    """One rank's end of an NCCL communicator; implements `Transport`, so every collective of gck takes it.

    All ranks make it at the same time, and call the same operations in the same order. Every wait is
    bounded by `timeout`. After any failure it is aborted and cannot be used any more: GroupUnusableError
    says why. Close it, or use it as a context manager, which aborts where an exception leaves the block.

    Args:
        unique_id: 128 bytes that rank 0 got from `create_unique_id` and sent to all; whoever has them can
            join. For one communicator only.
        rank: this rank, in [0, world_size).
        world_size: number of ranks.
        timeout: seconds that one wait may take, and the initialisation.
        device: the CUDA device of this rank. Default: torch's current one.

    Raises:
        ArgumentError: an argument is out of range.
        BackendUnavailableError: NCCL is not installed, too old or incomplete; says what to do.
        CollectiveTimeoutError: not all ranks came in time.
        PeerLostError, CollectiveError: with NCCL's own text.
    """

    def __init__(
        self,
        unique_id: bytes,
        rank: int,
        world_size: int,
        *,
        timeout: float = 60.0,
        device: torch.device | int | str | None = None,
    ) -> None:
        function = "NcclCommunicator"
        if not isinstance(unique_id, bytes) or len(unique_id) != 128:
            # Not its value, which would let others in; and first, since texts of the others quote theirs.
            size = f" of {len(unique_id)}" if isinstance(unique_id, bytes) else ""
            raise ArgumentError(
                f"{function}: unique_id must be 128 bytes, got {type(unique_id).__name__}{size}"
            )
        rank, world_size = plain_int(rank), plain_int(world_size)
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
            raise ArgumentError(f"{function}: world_size must be a positive int, got {world_size!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ArgumentError(f"{function}: rank must be an int in [0, {world_size}), got {rank!r}")
        seconds = check_timeout(timeout)
        with _on(device):
            native = load().NcclCommunicator(wheels(), unique_id, rank, world_size, seconds)
        self._take(native, seconds)

    @staticmethod
    def create_unique_id() -> bytes:
        """128 bytes for all ranks of one new communicator; made by rank 0 alone, and kept secret."""
        unique_id: bytes = load().nccl_unique_id(wheels())
        return unique_id

    @classmethod
    def from_group(
        cls,
        group: Any = None,
        *,
        timeout: float | None = None,
        device: torch.device | int | str | None = None,
    ) -> NcclCommunicator:
        """The ranks of `group` (as all collectives take it; default: WORLD), which carries the unique id.

        Raises:
            BackendUnavailableError: a rank has no NCCL; raised on all.
            CollectiveMismatchError: ranks have different versions of NCCL; on all.
            As the constructor, and as collectives over `group`.
        """
        transport = resolve(group, timeout)
        unique_id = exchange_by_group(transport)
        return cls(unique_id, transport.rank, transport.world_size, timeout=transport.timeout, device=device)

    @classmethod
    def from_store(
        cls,
        store: Any,
        rank: int,
        world_size: int,
        *,
        timeout: float = 60.0,
        device: torch.device | int | str | None = None,
        name: str = "gck/nccl",
    ) -> NcclCommunicator:
        """Ranks that share a torch.distributed Store, which carries the unique id and forgets it.

        Args:
            name: prefix of the keys; ranks that share a store but no communicator need different ones.

        Raises:
            Those of `from_group`; CollectiveTimeoutError, PeerLostError of the store.
        """
        seconds = check_timeout(timeout)
        unique_id, forget = exchange_by_store(store, rank, world_size, name, seconds)
        made = cls(unique_id, rank, world_size, timeout=seconds, device=device)
        with suppress(RuntimeError, NotImplementedError):  # not every store can delete
            forget()
        return made

    def _take(self, native: Any, timeout: float) -> None:
        device = torch.device("cpu") if native.device < 0 else torch.device("cuda", native.device)
        self._shared, self._timeout = Shared(native, device), timeout
        # Also at the end of the interpreter, before the library's own threads lose what they stand on.
        weakref.finalize(self._shared, _leave, native)

    @property
    def timeout(self) -> float:
        return self._timeout

    @property
    def calls(self) -> CallLog:
        return self._shared.calls

    def with_timeout(self, seconds: float) -> NcclCommunicator:
        """The same communicator with another timeout."""
        same = copy.copy(self)
        same._timeout = check_timeout(seconds)
        return same

    def __repr__(self) -> str:
        reason = self._shared.native.reason
        state = f", unusable: {reason}" if reason else ""
        return f"<NcclCommunicator rank {self.rank} of {self.world_size} on {self.device}{state}>"

    # Transport

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return self._returned(self.all_gather(self._here(send)), send)

    def all_gather_bodies(self, fields: Sequence[Tensor]) -> Tensor:
        """(world_size, nbytes) uint8: the body of every rank's `fields`, in one launch.

        What is not one body yet is packed into this rank's row, which NCCL gathers in place: ranks launch the
        same, whether it is or not.
        """
        layout, body = layout_of(*fields), body_in_place(*fields)
        _use(fields)
        rows = torch.empty((self.world_size, layout.nbytes), dtype=torch.uint8, device=self.device)
        if body is None:
            body = rows[self.rank]
            layout.pack_(body, fields)
        body = self._here(body)
        if layout.nbytes:
            self._run("all_gather", ([(body.data_ptr(), rows.data_ptr(), layout.nbytes)],), body, rows)
        return self._returned(rows, fields[0])

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self._returned(self.all_to_all(self._here(send)), send)

    def reduce_bytes(self, send: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """`all_to_all_bytes`, `reduce` of what came, and `all_gather_bytes`, in one call into C++."""
        self._shared.native.refuse_group("packed_all_reduce")
        if send.device != self.device:
            return self.all_gather_bytes(reduce(self.all_to_all_bytes(send)))
        send = send.contiguous()
        received = torch.empty_like(send)
        made: list[Tensor] = []

        def reduced() -> tuple[int, int, int]:
            message = reduce(received).contiguous()
            rows = message.new_empty(self.world_size, len(message))
            made.extend((message, rows))
            return message.data_ptr(), rows.data_ptr(), len(message)

        fields = (send.data_ptr(), received.data_ptr(), send.nbytes // self.world_size, reduced)
        try:
            self._run("packed_all_reduce", fields, send, received)
        except BaseException:
            self._shared.keep(made)
            raise
        return made[1]

    def barrier(self) -> None:
        """Returns once every rank has called it, and what was started before has ended."""
        self.all_reduce(torch.zeros(1, dtype=torch.int32, device=self.device))
        self.synchronize()

    def close(self) -> None:
        """Ends what was started, at most `timeout` seconds, and leaves. A second time does nothing.

        Asynchronous collectives in flight come first.

        Raises:
            CollectiveTimeoutError, PeerLostError, CollectiveError: it was aborted instead.
        """
        # Of a communicator that is aborted meanwhile nothing is left to wait for.
        limit = TurnLimit(self._timeout, lambda function: None, self.abort)
        with self.calls.queue.turn("close", limit):
            self._shared.native.close(self._timeout)
        self.calls.queue.end()

    def __enter__(self) -> NcclCommunicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort(f"{kind.__name__} left its block")

    def sparse_all_gather(self, payload: P, *, stream: Stream = None) -> list[P]:
        """Every rank's payload, values and indices in one launch; for payloads of one layout on all ranks.

        Where `gck.sparse_all_gather` compares layouts and waits for the result, this does neither: the host
        never waits, and it may be captured in a CUDA graph. The result is in the order of the current stream,
        or of `stream`: see `Operations`.
        Of a payload on another device than the communicator's the host does wait.

        Returns:
            world_size payloads whose tensors are views of one new buffer on the payload's device.

        Raises:
            ArgumentError, DeviceMismatchError: payload is no tuple of tensors of one device, and what else it
                holds. What the communicator does.
        """
        fields = (
            [value for value in payload if isinstance(value, Tensor)] if isinstance(payload, tuple) else []
        )
        if not fields:
            raise ArgumentError(f"sparse_all_gather: payload must be a payload, got {shown(payload)}")
        for index, field in enumerate(fields):
            checks.check_tensor("sparse_all_gather", f"tensor {index}", field)
            checks.check_device("sparse_all_gather", f"tensor {index}", field, "the first one", fields[0])
        with self._on_stream("sparse_all_gather", stream):
            return payloads_of(payload, self.all_gather_bodies(fields))

    @contextmanager
    def group(self) -> Iterator[None]:
        """Operations of the block start together at its end, as NCCL's group calls do.

        Sends and receives among several ranks need it. Results are there once the block has ended. An
        exception that leaves the block aborts the communicator: peers have started the whole of it.
        """
        with self.turn("group"):
            yield from self._group()

    def _group(self) -> Iterator[None]:
        shared = self._shared
        shared.native.group_start(self._timeout)
        held: list[Tensor] = []
        shared.grouped = held
        try:
            try:
                yield
            except BaseException as error:
                self.abort(f"{type(error).__name__} left a group")
                with suppress(GckError):
                    shared.native.group_end(self._timeout)
                raise
            shared.native.group_end(self._timeout)
        finally:
            shared.grouped = None
            for stream in shared.streams:
                shared.mark(stream)
            shared.streams.clear()
            shared.keep(held)

    def split(self, color: int | None, key: int = 0) -> NcclCommunicator | None:
        """A communicator of the ranks that give the same colour, ordered by key, then by rank.

        All ranks call it; one without a colour gets None.
        """
        color, key = plain_int(color), plain_int(key)
        if color is not None and (isinstance(color, bool) or not isinstance(color, int) or color < 0):
            raise ArgumentError(f"split: color must be None or an int of at least 0, got {color!r}")
        with self.turn("split"), _on(self.device if self.device.type == "cuda" else None):
            native = self._shared.native.split(-1 if color is None else color, key, self._timeout)
        if native is None:
            return None
        child = object.__new__(NcclCommunicator)
        child._take(native, self._timeout)
        return child


def _use(tensors: Sequence[Tensor]) -> None:
    """Their memory goes to nobody else before the current stream has come as far as this."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _on(device: torch.device | int | str | None) -> AbstractContextManager[Any]:
    """Within it, `device` is the current CUDA device and has a context; nothing without CUDA."""
    if not torch.cuda.is_available():
        return nullcontext()
    torch.cuda.init()
    return torch.cuda.device(torch.cuda.current_device() if device is None else device)


def _leave(native: Any) -> None:
    """Closes what nobody closed; peers may still be reading what this rank sent."""
    if native.reason:
        return
    try:
        native.close(LEAVE)
    except CollectiveError as error:
        native.abort("its owner is gone")  # also under a thread that still waits
        # Time for that thread to be back: one that leaves C++ when the interpreter has ended takes it down.
        time.sleep(0.5)
        sys.stderr.write(f"gck: an NcclCommunicator that was never closed: {error}\n")
