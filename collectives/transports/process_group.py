"""A torch.distributed ProcessGroup as a transport: gloo on the CPU, nccl and others on devices.

After a timeout gloo's threads may still write into the tensors of the operation, so the caller must
never pass memory whose content matters after a failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from gck.collectives.transports import CallLog, Done, Started, check_timeout, ring, rotation
from gck.collectives.transports.exchange import Exchange
from gck.collectives.transports.failures import typed_error
from gck.collectives.transports.forked import is_inherited
from gck.collectives.transports.gloo import carries_cpu_tensors, close_connections
from gck.collectives.transports.operation import Operation, end_all
from gck.collectives.transports.ring import Ring
from gck.errors import CollectiveMismatchError, GroupUnusableError

__all__ = ["ProcessGroupTransport"]

_HOST = torch.device("cpu")
INTERRUPTIBLE = 0.25  # seconds that Ctrl-C may have to wait for
# all_gather_into_tensor was renamed; the old name warns where the new one exists.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class _GroupState:
    """What this process knows of one ProcessGroup, however often it is resolved."""

    group: ReferenceType[Any]
    gloo: bool  # for what lies on the host
    only_gloo: bool
    calls: CallLog = field(default_factory=CallLog)
    unusable: str | None = None
    rotation: rotation.Rotation | None = None  # the last one
    ring: ring.Ring | None = None


E = TypeVar("E", bound=Exchange)

# Keyed weakly: the state must not keep a destroyed group, and its sockets, alive.
_states: WeakKeyDictionary[Any, _GroupState] = WeakKeyDictionary()


class ProcessGroupTransport:
    """Implements `Transport` over torch.distributed; make one with `of` or `resolve`.

    Every operation is asynchronous with a bounded wait. gloo takes CPU tensors (and moves CUDA tensors
    through the host itself); for backends without CPU support, bytes go through the current device.
    """

    def __init__(self, state: _GroupState, timeout: float) -> None:
        self._state = state
        self._timeout = timeout
        self._gloo = state.gloo
        self._rank: int = dist.get_rank(state.group())
        self._world_size: int = dist.get_world_size(state.group())

    @classmethod
    def of(cls, group: dist.ProcessGroup, timeout: float | None = None) -> ProcessGroupTransport:
        """The transport of `group`; `timeout` is limited to the group's own, which is the default.

        Raises:
            GroupUnusableError: the group was destroyed, or made before this process was forked.
        """
        _check_own(group)
        if _destroyed(group):
            raise GroupUnusableError("the group was destroyed; make a new one")
        state = _states.get(group)
        if state is None:
            state = _states[group] = _GroupState(
                ref(group), carries_cpu_tensors(group), dist.get_backend(group) == "gloo"
            )
        own = _group_timeout(group)
        return cls(state, own if timeout is None else min(check_timeout(timeout), own))

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def timeout(self) -> float:
        return self._timeout

    @property
    def calls(self) -> CallLog:
        return self._state.calls

    def with_timeout(self, seconds: float) -> ProcessGroupTransport:
        return ProcessGroupTransport.of(self._group("with_timeout"), seconds)

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return self.start_all_gather_bytes(send).wait()

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self.start_all_to_all_bytes(send).wait()

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        group = self._group("all_gather")
        if self._world_size == 1 or send.numel() == 0:
            return Done(send.expand(self._world_size, -1).clone())
        local = _onto(group, send)
        if self._is_long(local.device, local.numel()):
            return self._expect_ring(group, local.numel())(local)
        recv = local.new_empty(self._world_size * local.numel())
        rows = recv.view(self._world_size, -1)
        operation = Operation(self, "all_gather", (local, recv), lambda: rows.to(send.device))
        operation.receiving(rows, [local.numel()])
        return operation.start(lambda: _all_gather(recv, local, group=group, async_op=True))

    def expect_all_gathers(self, sizes: Sequence[int]) -> list[Callable[[Tensor], Started]]:
        """See `gck.collectives.transports.expect_all_gathers`; where these go in rings."""
        if self._world_size == 1 or not all(self._is_long(_HOST, nbytes) for nbytes in sizes):
            return []
        group, expected = self._group("all_gather"), []
        try:
            for nbytes in sizes:
                expected.append(self._expect_ring(group, nbytes, now=True))
        except BaseException as error:
            # What comes for those before it would be taken for that of the next all-gather.
            self.abort(f"{type(error).__name__} in all_gather")
            raise
        return expected

    def start_all_to_all_bytes(self, send: Tensor) -> Started:
        group = self._group("all_to_all")
        if self._world_size == 1 or send.numel() == 0:
            return Done(send.clone())
        local = _onto(group, send)
        recv = torch.empty_like(local)
        operation = Operation(self, "all_to_all", (local, recv), lambda: recv.to(send.device))
        if self._is_long(local.device, local.shape[1]):
            operation.receiving(recv, rotation.part_ends(local.shape[1]))
            return operation.start(partial(self._rotation, group, local, recv))
        operation.receiving(recv, [local.shape[1]])
        return operation.start(lambda: dist.all_to_all_single(recv, local, group=group, async_op=True))

    def start_all_to_all_as_made(self, send: Tensor, make: Callable[[int], None]) -> Started:
        """See `gck.collectives.transports.start_all_to_all_as_made`; where the all-to-all goes in rounds."""
        if self._world_size == 1 or not send.numel() or not self._is_long(send.device, send.shape[1]):
            for row in range(len(send)):
                make(row)
            return self.start_all_to_all_bytes(send)
        group, recv = self._group("all_to_all"), torch.empty(send.shape, dtype=send.dtype, device=_HOST)
        operation = Operation(self, "all_to_all", (send, recv), lambda: recv)
        operation.receiving(recv, rotation.part_ends(send.shape[1]))
        try:
            operation.start(partial(self._rotation, group, send, recv, as_made=True))
            rounds: Any = operation.work
            if rounds is None:  # another thread has given the group up
                self._check_usable()
            for j, row in enumerate(rotation.order_of_rows(self._rank, self._world_size)):
                # No earlier than while the one before it is on the wire: other ranks of this machine, whose
                # first row everybody waits for, may want the processor.
                rounds.coming(j - 1)
                make(row)
                operation.post(partial(rounds.made, row))
        except BaseException as error:
            # Peers have some of the rows, and wait for the others.
            self.abort(f"{type(error).__name__} in all_to_all")
            raise
        return operation

    def all_reduce(self, tensor: Tensor) -> None:
        group = self._group("all_reduce")
        if self._world_size == 1 or tensor.numel() == 0:
            return
        local = _onto(group, tensor)
        operation = Operation(self, "all_reduce", (local,), lambda: local)
        operation.start(lambda: dist.all_reduce(local, group=group, async_op=True)).wait()
        if local is not tensor:
            tensor.copy_(local)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1))

    def synchronize(self) -> None:
        """Nothing: every operation has waited for its end."""

    def split(self, color: int) -> ProcessGroupTransport:
        """A new process group: of the ranks that give the same colour, in rank order.

        All ranks of this group call it, and no others need to.

        Raises:
            PeerLostError, CollectiveTimeoutError: a rank did not come; this group is unusable.
        """
        group = self._group("split")
        send = torch.tensor([color], dtype=torch.int64).view(torch.uint8)
        colors = self.all_gather_bytes(send).view(torch.int64).view(-1).tolist()
        ranks = [dist.get_global_rank(group, r) for r, other in enumerate(colors) if other == color]
        began = time.monotonic()
        try:
            child = dist.new_group(
                sorted(ranks),
                timeout=timedelta(seconds=self._timeout),
                backend=dist.get_backend_config(group),
                use_local_synchronization=True,
            )
        except Exception as error:  # a rank that died since, or does not come
            self._spoil("split", error, time.monotonic() - began)
        return ProcessGroupTransport.of(child)

    def abort(self, reason: str) -> None:
        group = self._state.group()
        self._state.unusable = self._state.unusable or f"aborted: {reason}"
        end_all(self._state)
        self._close()
        # NCCL stops its kernels; gloo ignores it.
        if group is not None and hasattr(group, "abort"):
            group.abort()
        self.calls.queue.end()

    def _is_long(self, device: torch.device, nbytes: int) -> bool:
        """Whether a message is worth an exchange of our own; gloo sends and receives host memory alone."""
        return self._gloo and device.type == "cpu" and nbytes >= rotation.ROTATE_FROM

    def _rotation(
        self,
        group: dist.ProcessGroup,
        send: Tensor,
        recv: Tensor,
        as_made: bool = False,
    ) -> rotation.Rotation:
        ends = group, send, recv, self._rank, self._timeout, self._state.rotation
        # `abort` finds it before it starts, so that nothing can leave it waiting for rows.
        self._state.rotation = rounds = rotation.Rotation(*ends, as_made)
        return self._started(rounds, rounds.start)

    def _expect_ring(
        self, group: dist.ProcessGroup, nbytes: int, now: bool = False
    ) -> Callable[[Tensor], Started]:
        """An all-gather in a ring, of host memory: what starts it. `now`: what will come is asked for."""
        rows = torch.empty(self._world_size, nbytes, dtype=torch.uint8, device=_HOST)
        operation = Operation(self, "all_gather", (rows,), lambda: rows)
        operation.receiving(rows, ring.part_ends(nbytes))
        made = Ring(group, rows, self._rank, self._timeout, operation.check_part)
        if now:
            operation.post(made.expect)

        def send(message: Tensor) -> Started:
            operation.tensors, operation.began = (message, rows), time.monotonic()
            # `abort` finds it before it starts.
            before, self._state.ring = self._state.ring, made
            return operation.start(lambda: self._started(made, partial(made.send, message, before)))

        return send

    def _started(self, exchange: E, start: Callable[[], None]) -> E:
        start()
        # Another thread may have given the group up, and not have seen this one.
        if self._state.unusable is not None:
            exchange.stop()
        return exchange

    def _group(self, operation: str) -> dist.ProcessGroup:
        """The group, unless it is gone or an earlier failure spoilt it."""
        group: dist.ProcessGroup | None = self._state.group()
        if self._state.unusable is not None:
            raise GroupUnusableError(
                f"{operation}: the group cannot be used any more ({self._state.unusable}); make a new one"
            )
        if group is None or _destroyed(group):
            raise GroupUnusableError(f"{operation}: the group was destroyed; make a new one")
        _check_own(group)
        return group

    def _spoil(self, operation: str, error: BaseException, elapsed: float) -> NoReturn:
        """Makes the group unusable and raises what `error` means."""
        if isinstance(error, GroupUnusableError):  # aborted meanwhile
            raise error
        if isinstance(error, CollectiveMismatchError):
            self._state.unusable = self._state.unusable or str(error)
            self._close()
            raise error
        if self._state.unusable is not None and isinstance(error, RuntimeError | OSError):
            raise GroupUnusableError(
                f"{operation} on {self._place()}: the group was given up meanwhile ({self._state.unusable})"
            ) from error
        typed = typed_error(f"{operation} on {self._place()}", error, elapsed)
        self._state.unusable = self._state.unusable or str(typed or repr(error))
        self._close()
        if typed is None:
            raise error
        raise typed from error

    def _close(self) -> None:
        """Closes gloo's connections, where the group cannot be used any more."""
        for exchange in (self._state.rotation, self._state.ring):
            if exchange is not None:
                exchange.stop()
        group = self._state.group()
        if group is not None and self._gloo and not is_inherited(group):
            close_connections(group, self._rank, self._world_size)

    def _place(self) -> str:
        """This rank of the group; and of all, where the group is a part of them, as a tier is."""
        place = f"rank {self._rank} of {self._world_size}"
        if not dist.is_initialized() or dist.get_world_size() == self._world_size:
            return place
        return f"{place} (rank {dist.get_rank()} of all {dist.get_world_size()})"

    def _poll(self, work: Any, began: float, device: torch.device) -> None:
        # A daemon thread that comes back from C++ into an interpreter that has ended takes the process down:
        # such a thread looks now and then, and leaves when the group is aborted.
        daemon = threading.current_thread().daemon
        if (self._state.only_gloo or (self._gloo and device.type == "cpu")) and not daemon:
            self._wait(work, began)
            return
        # Device backends order `wait` on the stream only; we must know that the bytes arrived before
        # residuals are committed, and within the timeout.
        while not work.is_completed():
            elapsed = time.monotonic() - began
            if elapsed > self._timeout:
                raise TimeoutError("operation timed out")
            self._check_usable()
            time.sleep(min(max(elapsed / 16, 2e-5), 1e-3))
        work.wait()

    def _wait(self, work: Any, began: float) -> None:
        """As `_poll`, by C++: it answers sooner, but Python sees to Ctrl-C only when it has come back."""
        while (left := began + self._timeout - time.monotonic()) > INTERRUPTIBLE:
            try:
                work.wait(timedelta(seconds=INTERRUPTIBLE))
                return
            except RuntimeError:
                if work.is_completed():
                    break  # so that it was not our wait which ran out
                self._check_usable()
        work.wait(timedelta(seconds=max(left, 0.001)))

    def _check_usable(self) -> None:
        if self._state.unusable is not None:
            raise GroupUnusableError(f"the group was given up meanwhile ({self._state.unusable})")


def _check_own(group: dist.ProcessGroup) -> None:
    if is_inherited(group):
        raise GroupUnusableError(
            "this process was forked after the group was made, and has neither its connections nor its "
            "threads; make a new group here"
        )


def _destroyed(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_backend(group)
    # RuntimeError where all of torch.distributed was, and TypeError where torch is older than 2.8.
    except (ValueError, RuntimeError, TypeError):
        return True
    return False


def _group_timeout(group: dist.ProcessGroup) -> float:
    """Seconds of the group's own timeout; torch's default where the backend does not tell."""
    default = dist.distributed_c10d.default_pg_timeout
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        own = getattr(options, "_timeout", None)
        if isinstance(own, timedelta):
            return own.total_seconds()
    return float(default.total_seconds())


def _onto(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """`tensor` contiguous and on a device that the group's backend can read."""
    types = {device.type for device in group._device_types}
    if tensor.device.type not in types and "cuda" in types:
        return tensor.to(torch.device("cuda", torch.cuda.current_device())).contiguous()
    return tensor.contiguous()
