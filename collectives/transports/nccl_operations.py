"""NCCL's operations on tensors, on torch's current stream or one that is given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gck.collectives.transports import CallLog
from gck.collectives.work.queue import TurnLimit
from gck.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveTimeoutError,
    DeviceMismatchError,
    DtypeError,
    ShapeMismatchError,
)
from gck.interop import borrowed, stream_at
from gck.kernels.common import checks

__all__ = ["Operations", "Shared", "Stream", "orphans"]

# ncclDataType_t and ncclRedOp_t
DTYPES = {
    torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7,
    torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
Stream = Any  # see Operations; None: torch's current one
# Buffers that an abort which did not end may still write to: never freed.
orphans: list[Tensor] = []


@dataclass
class Shared:
    """What a communicator and its copies with other timeouts have in common."""

    native: Any
    device: torch.device
    calls: CallLog = field(default_factory=CallLog)
    grouped: list[Tensor] | None = None  # of the open group, which uses them when it ends
    # By stream, since the last wait: where it stood after its last operation.
    events: dict[int, torch.cuda.Event] = field(default_factory=dict)
    streams: list[torch.cuda.Stream] = field(default_factory=list)  # of the open group's operations

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Of an operation that has failed: for ever, where the library may still write to them."""
        if not self.native.quiescent:
            orphans.extend(tensors)

    def mark(self, stream: torch.cuda.Stream) -> None:
        """An operation went to `stream`; a group's go there when it ends."""
        if self.grouped is not None:
            self.streams.append(stream)
        elif not torch.cuda.is_current_stream_capturing():
            self.events.setdefault(stream.cuda_stream, torch.cuda.Event()).record(stream)


class Operations:
    """What a communicator does with tensors of its `device`.

    Operations are ordered on torch's current stream, or on `stream`: one of torch's, anything else with a
    `ptr`, as CuPy's have, or a cudaStream_t as an int. There everything about the operation happens, what is
    returned is allocated too; what made the tensors is for the caller to order before it, and what uses them
    after, as between any two streams. Operations return once the library has taken them; `synchronize` waits,
    within the timeout, for what was started. A library that works on host memory, as the tests' does, has
    moved the bytes when an operation returns.

    Arrays of CuPy, NumPy and whatever speaks DLPack are taken as tensors are, CuPy's on CuPy's current
    stream; what is new is returned as a tensor. Every operation raises DtypeError, LayoutError,
    DeviceMismatchError or ArgumentError before anything is sent, and then what the communicator does.
    """

    _shared: Shared
    _timeout: float

    @property
    def rank(self) -> int:
        rank: int = self._shared.native.rank
        return rank

    @property
    def world_size(self) -> int:
        size: int = self._shared.native.world_size
        return size

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self._shared.device

    def all_gather(self, send: Tensor, *, stream: Stream = None) -> Tensor:
        """`send` of every rank, all of one shape: a new (world_size, *send.shape) tensor."""
        return self.all_gather_many([send], stream=stream)[0]

    def all_gather_many(self, sends: Sequence[Tensor], *, stream: Stream = None) -> list[Tensor]:
        """`all_gather` of several tensors in one launch: values and indices, say."""
        named = {f"sends[{i}]": send for i, send in enumerate(sends)}
        with self._taken("all_gather", (), stream, **named) as tensors:
            recvs = [send.new_empty(self.world_size, *send.shape) for send in tensors]
            pairs = [(send, recv) for send, recv in zip(tensors, recvs, strict=True) if send.numel()]
            fields = [(send.data_ptr(), recv.data_ptr(), send.nbytes) for send, recv in pairs]
            if fields:
                self._run("all_gather", (fields,), *tensors, *recvs)
            return recvs

    def all_to_all(
        self,
        send: Tensor,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        *,
        stream: Stream = None,
    ) -> Tensor:
        """Part r of `send` goes to rank r; returned are the parts for this rank, in the order of ranks.

        Args:
            send: (world_size, ...), one row a rank; or flat, with counts.
            send_counts, recv_counts: elements of each part; rank s sends to rank r what r expects from s.
        """
        size = self.world_size
        with self._taken("all_to_all", (), stream, send=send) as [send]:
            if (send_counts is None) != (recv_counts is None):
                raise ArgumentError("all_to_all: send_counts and recv_counts must both be given, or neither")
            if send_counts is None or recv_counts is None:
                if send.dim() == 0 or send.shape[0] != size:
                    raise ShapeMismatchError(
                        f"all_to_all: send must have {size} rows, got {tuple(send.shape)}"
                    )
                recv = torch.empty_like(send)
                fields = (send.data_ptr(), recv.data_ptr(), send.nbytes // size)
                self._run("all_to_all_rows", fields, send, recv)
                return recv
            for name, counts in (("send_counts", send_counts), ("recv_counts", recv_counts)):
                if len(counts) != size or any(not isinstance(n, int) or n < 0 for n in counts):
                    raise ArgumentError(
                        f"all_to_all: {name} must be {size} ints of at least 0, got {list(counts)}"
                    )
            if sum(send_counts) != send.numel():
                raise ShapeMismatchError(
                    f"all_to_all: send_counts add up to {sum(send_counts)}, send has {send.numel()}"
                )
            recv = send.new_empty(sum(recv_counts))
            width, peers = send.element_size(), []
            source, target = send.data_ptr(), recv.data_ptr()
            for peer, (out, back) in enumerate(zip(send_counts, recv_counts, strict=True)):
                peers.append((peer, source, out * width, target, back * width))
                source, target = source + out * width, target + back * width
            self._run("all_to_all", (peers,), send, recv)
            return recv

    def reduce_scatter(self, send: Tensor, op: str = "sum", *, stream: Stream = None) -> Tensor:
        """Row r of `send`, (world_size, ...), reduced over ranks goes to rank r: a new tensor."""
        code = _op("reduce_scatter", op)
        with self._taken("reduce_scatter", (), stream, send=send) as [send]:
            if send.dim() == 0 or send.shape[0] != self.world_size:
                raise ShapeMismatchError(
                    f"reduce_scatter: send must have {self.world_size} rows, got {tuple(send.shape)}"
                )
            recv = send.new_empty(send.shape[1:])
            if recv.numel():
                arguments = (send.data_ptr(), recv.data_ptr(), recv.numel(), DTYPES[send.dtype], code)
                self._run("reduce_scatter", arguments, send, recv)
            return recv

    def broadcast(self, tensor: Tensor, root: int = 0, *, stream: Stream = None) -> None:
        """`tensor` of rank `root` to all others', in place."""
        self._check_peer("broadcast", "root", root)
        with self._taken("broadcast", ("tensor",), stream, tensor=tensor) as [tensor]:
            if tensor.numel():
                address = tensor.data_ptr()
                self._run("broadcast", (address, address, tensor.nbytes, root), tensor)

    def send(self, tensor: Tensor, peer: int, *, stream: Stream = None) -> None:
        """To `peer`, which must call `recv` with as many bytes."""
        self._check_peer("send", "peer", peer)
        with self._taken("send", (), stream, tensor=tensor) as [tensor]:
            self._run("all_to_all", ([(peer, tensor.data_ptr(), tensor.nbytes, 0, 0)],), tensor)

    def recv(self, tensor: Tensor, peer: int, *, stream: Stream = None) -> None:
        """From `peer`, into `tensor`."""
        self._check_peer("recv", "peer", peer)
        with self._taken("recv", ("tensor",), stream, tensor=tensor) as [tensor]:
            self._run("all_to_all", ([(peer, 0, 0, tensor.data_ptr(), tensor.nbytes)],), tensor)

    def all_reduce(self, tensor: Tensor, op: str = "sum", *, stream: Stream = None) -> None:
        """Reduces in place; op "sum", "prod", "max", "min" or "avg". The same bits on every rank."""
        code = _op("all_reduce", op)
        on = self._on_stream("all_reduce", stream)
        with borrowed("all_reduce", ("tensor",), tensor=tensor) as [tensor], on:
            checks.check_tensor("all_reduce", "tensor", tensor)
            # What a group returns elsewhere could only be copied back once it has ended.
            local = tensor if self._shared.grouped is not None else self._here(tensor)
            self._check("all_reduce", "tensor", local)
            if local.numel():
                address, count, dtype = local.data_ptr(), local.numel(), DTYPES[local.dtype]
                self._run("all_reduce", (address, address, count, dtype, code), local)
            if local is not tensor:
                tensor.copy_(self._returned(local, tensor))

    def abort(self, reason: str) -> None:
        """Stops what runs; peers that wait for this rank fail. At any time, from any thread."""
        self._shared.native.abort(str(reason))
        self._shared.calls.queue.end()

    def turn(self, function: str) -> AbstractContextManager[None]:
        """Within it nothing else of this communicator runs; waits for it at most `timeout` seconds after the
        call before it has ended, and no longer than until the communicator is aborted.

        Raises:
            CollectiveTimeoutError: another call had it all the time; the communicator is aborted.
            GroupUnusableError: it was aborted while this waited.
        """
        return self._shared.calls.queue.turn(
            function, TurnLimit(self._timeout, self._shared.native.check, self.abort)
        )

    def synchronize(self) -> None:
        """Waits until what the current stream holds has ended, and what was started on others.

        At most `timeout` seconds; in a capture, not at all. Asynchronous collectives in flight come first.

        Raises:
            CollectiveTimeoutError: it has not; the communicator is aborted.
            PeerLostError, CollectiveError: it never will, for NCCL reported an error.
        """
        with self.turn("synchronize"):
            self._synchronize()

    def _synchronize(self) -> None:
        native = self._shared.native
        native.check("synchronize")
        if self.device.type == "cpu":
            return
        began = time.monotonic()
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                return
            current = torch.cuda.Event()
            current.record()
            ended = [*self._shared.events.values(), current]
            while not self._ended(ended):
                native.check("synchronize")
                elapsed = time.monotonic() - began
                if elapsed > self._timeout:
                    text = f"rank {self.rank} of {self.world_size}: no answer after {elapsed:.1f} s"
                    native.abort(f"synchronize on {text}")
                    raise CollectiveTimeoutError(f"synchronize on {text}")
                time.sleep(0 if elapsed < 1e-3 else 1e-4)
        self._shared.events.clear()
        # Operations that an abort ended have ended too.
        native.check("synchronize")

    def _ended(self, events: list[torch.cuda.Event]) -> bool:
        try:
            return all(event.query() for event in events)
        except RuntimeError as error:  # of the device, by one of its kernels
            self._shared.native.abort(f"a device error: {error}")
            raise CollectiveError(f"synchronize on rank {self.rank}: a device error ({error})") from error

    def _run(self, operation: str, arguments: tuple[Any, ...], *tensors: Tensor) -> None:
        """Starts an operation of the native communicator on the current stream."""
        native, stream = self._shared.native, 0
        cuda = self.device.type == "cuda"
        context: AbstractContextManager[Any] = torch.cuda.device(self.device) if cuda else nullcontext()
        with context:
            if cuda:
                current = torch.cuda.current_stream()
                stream = current.cuda_stream
                for tensor in tensors:
                    tensor.record_stream(current)  # it may have been made on another
            if self._shared.grouped is not None:
                self._shared.grouped += tensors
            try:
                with self.turn(operation):
                    getattr(native, operation)(*arguments, stream, self._timeout)
                    if cuda:
                        self._shared.mark(current)
            except BaseException:
                self._shared.keep(tensors)
                raise

    @contextmanager
    def _taken(
        self, operation: str, mutable: tuple[str, ...], stream: Stream, **arrays: Any
    ) -> Iterator[list[Tensor]]:
        """The arrays as tensors that NCCL can take, by name; inside, `stream` is the current one if given."""
        on = self._on_stream(operation, stream)
        with borrowed(operation, mutable, **arrays) as tensors, on:
            for name, tensor in zip(arrays, tensors, strict=True):
                self._check(operation, name, tensor)
            yield tensors

    def _on_stream(self, operation: str, stream: Stream) -> AbstractContextManager[Any]:
        """Within it, `stream` is torch's current one of the communicator's device; None changes nothing."""
        if stream is None:
            return nullcontext()
        if self.device.type == "cpu":
            raise ArgumentError(
                f"{operation}: stream must be None where ranks exchange host memory, got {stream!r}"
            )
        if not isinstance(stream, torch.cuda.Stream):
            handle = getattr(stream, "ptr", stream)
            if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
                raise ArgumentError(f"{operation}: stream must be a stream or a cudaStream_t, got {stream!r}")
            stream = stream_at(handle, self.device)
        if stream.device != self.device:
            raise DeviceMismatchError(
                f"{operation}: stream must be one of the communicator's device {self.device}, got {stream!r}"
            )
        return torch.cuda.stream(stream)

    def _check(self, operation: str, name: str, tensor: Tensor) -> None:
        checks.check_tensor(operation, name, tensor)
        if tensor.dtype not in DTYPES:
            raise DtypeError(f"{operation}: {name} must be of a dtype that NCCL has, got {tensor.dtype}")
        if tensor.device != self.device:
            raise DeviceMismatchError(
                f"{operation}: {name} must be on the communicator's device {self.device}, got {tensor.device}"
            )

    def _check_peer(self, operation: str, name: str, rank: object) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.world_size:
            raise ArgumentError(f"{operation}: {name} must be a rank in [0, {self.world_size}), got {rank!r}")

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).contiguous()

    def _returned(self, local: Tensor, like: Tensor) -> Tensor:
        if local.device == like.device:
            return local
        self.synchronize()  # a copy to the host would wait without a limit
        return local.to(like.device)


def _op(operation: str, op: object) -> int:
    if not isinstance(op, str) or op not in OPS:
        names = ", ".join(f'"{name}"' for name in OPS)
        raise ArgumentError(f"{operation}: op must be one of {names}, got {op!r}")
    return OPS[op]
