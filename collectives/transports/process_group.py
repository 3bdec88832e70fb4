"""A torch.distributed ProcessGroup as a transport: gloo on the CPU, nccl and others on devices.

torch reports failures as RuntimeError with a text; gloo's texts, seen with torch 2.13, are:

    a peer's process ended    "... Connection closed by peer [address]", "Connection reset by peer",
                              "Broken pipe", "Connection refused"; at once, on every operation
    our wait expired          "Operation timed out!"
    the group's own timeout   "Timed out waiting 3000ms for recv operation to complete" (or send)
    any call after a timeout  "Application timeout caused pair closure"

After a timeout gloo's threads may still write into the tensors of the operation, so the caller must
never pass memory whose content matters after a failure. They also hold up the end of the process until
the group's own timeout has passed: give `init_process_group` a short one rather than each call.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from gck.collectives.transports import CallLog, check_timeout
from gck.errors import CollectiveError, CollectiveTimeoutError, GroupUnusableError, PeerLostError

__all__ = ["ProcessGroupTransport", "typed_error"]

TIMEOUT_TEXT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
PEER_TEXT = re.compile(
    r"closed by peer|reset by peer|closed by remote|broken pipe"
    r"|connection (was )?(refused|closed|reset|aborted)|remote process exited|socket closed"
    r"|peer .*(closed|lost)|ncclRemoteError|unexpectedly exited",
    re.IGNORECASE,
)
# all_gather_into_tensor was renamed; the old name warns where the new one exists.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class _GroupState:
    """What this process knows of one ProcessGroup, however often it is resolved."""

    group: ReferenceType[Any]
    calls: CallLog = field(default_factory=CallLog)
    unusable: str | None = None


# Keyed weakly: the state must not keep a destroyed group, and its sockets, alive.
_states: WeakKeyDictionary[Any, _GroupState] = WeakKeyDictionary()
# CPU tensors of the last operation, on any group. gloo's threads let go of them some time after `wait`
# returned; who lets go last needs the interpreter's lock, and in a process that is about to end, a thread
# that waits for the lock aborts it.
_last: list[Tensor] = []


class ProcessGroupTransport:
    """Implements `Transport` over torch.distributed; make one with `of` or `resolve`.

    Every operation is asynchronous with a bounded wait. gloo takes CPU tensors (and moves CUDA tensors
    through the host itself); for backends without CPU support, bytes go through the current device.
    """

    def __init__(self, state: _GroupState, timeout: float) -> None:
        self._state = state
        self._timeout = timeout
        self._rank: int = dist.get_rank(state.group())
        self._world_size: int = dist.get_world_size(state.group())

    @classmethod
    def of(cls, group: dist.ProcessGroup, timeout: float | None = None) -> ProcessGroupTransport:
        """The transport of `group`; `timeout` is limited to the group's own, which is the default."""
        state = _states.get(group)
        if state is None:
            state = _states[group] = _GroupState(ref(group))
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
        group = self._group("all_gather")
        if self._world_size == 1 or send.numel() == 0:
            return send.expand(self._world_size, -1).clone()
        local = _onto(group, send)
        recv = local.new_empty(self._world_size * local.numel())
        self._wait("all_gather", lambda: _all_gather(recv, local, group=group, async_op=True), local, recv)
        return recv.view(self._world_size, -1).to(send.device)

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        group = self._group("all_to_all")
        if self._world_size == 1 or send.numel() == 0:
            return send.clone()
        local = _onto(group, send)
        recv = torch.empty_like(local)
        self._wait(
            "all_to_all",
            lambda: dist.all_to_all_single(recv, local, group=group, async_op=True),
            local,
            recv,
        )
        return recv.to(send.device)

    def all_reduce(self, tensor: Tensor) -> None:
        group = self._group("all_reduce")
        if self._world_size == 1 or tensor.numel() == 0:
            return
        local = _onto(group, tensor)
        self._wait("all_reduce", lambda: dist.all_reduce(local, group=group, async_op=True), local)
        if local is not tensor:
            tensor.copy_(local)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1))

    def synchronize(self) -> None:
        """Nothing: every operation has waited for its end."""

    def abort(self, reason: str) -> None:
        group = self._state.group()
        self._state.unusable = self._state.unusable or f"aborted: {reason}"
        # NCCL stops its kernels; gloo ignores it, and its peers wait for their own timeout.
        if group is not None and hasattr(group, "abort"):
            group.abort()
        self.calls.queue.end()

    def _group(self, operation: str) -> dist.ProcessGroup:
        """The group, unless it is gone or an earlier failure spoilt it."""
        group: dist.ProcessGroup | None = self._state.group()
        if self._state.unusable is not None:
            raise GroupUnusableError(
                f"{operation}: the group cannot be used any more ({self._state.unusable}); make a new one"
            )
        if group is None:
            raise GroupUnusableError(f"{operation}: the group was destroyed")
        return group

    def _wait(self, operation: str, start: Any, *tensors: Tensor) -> None:
        """Starts an operation on `tensors` and waits for it; failures become typed errors."""
        _last[:] = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        began = time.monotonic()
        try:
            work = start()
            if work is not None:
                self._poll(work, began)
        except GroupUnusableError:  # aborted meanwhile
            raise
        except BaseException as error:
            elapsed = time.monotonic() - began
            typed = typed_error(f"{operation} on rank {self._rank} of {self._world_size}", error, elapsed)
            self._state.unusable = str(typed or repr(error))
            if typed is None:
                raise
            raise typed from error

    def _poll(self, work: Any, began: float) -> None:
        # A daemon thread that comes back from C++ into an interpreter that has ended takes the process down:
        # such a thread looks now and then, and leaves when the group is aborted.
        daemon = threading.current_thread().daemon
        if dist.get_backend(self._state.group()) == "gloo" and not daemon:
            work.wait(timedelta(seconds=self._timeout))
            return
        # Device backends order `wait` on the stream only; we must know that the bytes arrived before
        # residuals are committed, and within the timeout.
        while not work.is_completed():
            elapsed = time.monotonic() - began
            if elapsed > self._timeout:
                raise TimeoutError("operation timed out")
            if self._state.unusable is not None:
                raise GroupUnusableError(f"the group was given up meanwhile ({self._state.unusable})")
            time.sleep(min(max(elapsed / 16, 2e-5), 1e-3))
        work.wait()


def typed_error(where: str, error: BaseException, elapsed: float) -> CollectiveError | None:
    """The gck error for what torch raised, or None where it is no failure of the group."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    text = str(error).partition(". This is typically caused")[0].strip()
    if PEER_TEXT.search(text) or isinstance(error, ConnectionError):
        return PeerLostError(f"{where}: a peer was lost after {elapsed:.1f} s ({text})")
    if TIMEOUT_TEXT.search(text):
        return CollectiveTimeoutError(f"{where}: no answer within {elapsed:.1f} s ({text})")
    return CollectiveError(f"{where}: failed after {elapsed:.1f} s ({text})")


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
