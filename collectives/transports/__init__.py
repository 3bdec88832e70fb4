"""Transports: how bytes move between ranks. Everything above them is the same on every backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import TIMEOUT_MAX
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from gck.collectives.transports import forked as forked  # early: it looks on when the process is forked
from gck.collectives.work import WorkQueue
from gck.errors import ArgumentError
from gck.values import plain_real, shown

__all__ = [
    "CallLog",
    "Done",
    "Started",
    "Transport",
    "await_peers",
    "check_timeout",
    "expect_all_gathers",
    "resolve",
    "start_all_gather",
    "start_all_to_all",
    "start_all_to_all_as_made",
]


@dataclass
class CallLog:
    """What one rank remembers of the collectives of one group, for the handshake.

    Attributes:
        sequence: collectives called so far.
        agreed: signatures that every rank has confirmed.
        queue: where collectives of this rank and group wait for their turn; ends with this object.
    """

    sequence: int = 0
    agreed: set[bytes] = field(default_factory=set)
    queue: WorkQueue = field(default_factory=WorkQueue)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.queue.end).atexit = False


@runtime_checkable
class Transport(Protocol):
    """One rank's end of a group.

    Every method is a collective: all ranks call it, in the same order, with tensors of the same size.
    Each wait is bounded by `timeout`. After PeerLostError or CollectiveTimeoutError the group is
    unusable, and every later call raises GroupUnusableError, which says why.

    A transport may also have `start_all_gather_bytes` and `start_all_to_all_bytes`, which return a `Started`
    at once: see `start_all_gather`; `expect_all_gathers`, see there; and `reduce_bytes`: see
    `pieces.in_one_call`. One that wraps another and passes on what it has not passes these on, too: then
    bytes go by them, and not by the methods below.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def timeout(self) -> float:
        """Seconds that one wait may take."""
        ...

    @property
    def calls(self) -> CallLog:
        """Shared by all transports of this rank and group."""
        ...

    def with_timeout(self, seconds: float) -> Transport:
        """The same group with another timeout."""
        ...

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        """(nbytes,) uint8 -> a new (world_size, nbytes) uint8 tensor; row r came from rank r."""
        ...

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        """(world_size, nbytes) uint8 -> a new one; row r came from rank r, which had it in row `rank`."""
        ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over ranks, in place, with the same bits on every rank; undefined after an error."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def synchronize(self) -> None:
        """Returns once every result is there; raises where one never will be.

        What the methods above return on the host is there when they return. On a device it may be ordered
        on the current stream only: nothing may be kept of it, or copied to the host, before this.
        """
        ...

    def abort(self, reason: str) -> None:
        """Gives the group up on this rank; peers that wait for it fail at once where the backend can tell."""
        ...


class Started(Protocol):
    """An operation under way; the tensor that was sent must not change before its end."""

    def wait(self) -> Tensor:
        """What the blocking method returns, or raises. Call it once, in the order of starts."""
        ...


@dataclass(frozen=True)
class Done:
    """An operation that had ended when it was started."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result


def start_all_gather(transport: Transport, send: Tensor) -> Started:
    """`transport.all_gather_bytes(send)`, under way where the transport can; else done when this returns."""
    start = getattr(transport, "start_all_gather_bytes", None)
    started: Started = Done(transport.all_gather_bytes(send)) if start is None else start(send)
    return started


def expect_all_gathers(transport: Transport, sizes: Sequence[int]) -> list[Callable[[Tensor], Started]]:
    """`start_all_gather` of each message to come, of so many bytes on the host; none where it cannot be.

    What peers will send is asked for now, so that they need not wait until this rank has something to send,
    and nobody has to ask while messages come. They must be started one after the other, with no other
    all-gather between them, or the group be given up: what was asked for is there to stay.
    """
    expect = getattr(transport, "expect_all_gathers", None)
    expected: list[Callable[[Tensor], Started]] = [] if expect is None else expect(sizes)
    return expected


def start_all_to_all(transport: Transport, send: Tensor) -> Started:
    """`transport.all_to_all_bytes(send)`, likewise."""
    start = getattr(transport, "start_all_to_all_bytes", None)
    started: Started = Done(transport.all_to_all_bytes(send)) if start is None else start(send)
    return started


def start_all_to_all_as_made(transport: Transport, send: Tensor, make: Callable[[int], None]) -> Started:
    """`start_all_to_all` of a message whose rows `make(row)` makes, in any order, on this thread.

    Where the transport can, a row is on the wire while the next ones are made. Returns when all are made.
    """
    start = getattr(transport, "start_all_to_all_as_made", None)
    if start is not None:
        started: Started = start(send, make)
        return started
    for row in range(len(send)):
        make(row)
    return start_all_to_all(transport, send)


def await_peers(started: Started) -> None:
    """Returns when peers have begun to send, or it has ended; at once where the transport cannot tell.

    Ranks may share processors: what is computed for later should not keep others from their first message.
    """
    coming = getattr(started, "await_peers", None)
    if coming is not None:
        coming()


def check_timeout(seconds: object) -> float:
    """A positive number of seconds, as many as a thread can wait.

    Raises:
        ArgumentError: it is not.
    """
    seconds = plain_real(seconds)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= TIMEOUT_MAX:
        raise ArgumentError(f"timeout must be a positive number of seconds, got {seconds!r}")
    return float(seconds)


# Not by isinstance, which from Python 3.12 on does not see what an object passes on to the one it wraps.
_MEMBERS = tuple(name for name in vars(Transport) if not name.startswith("_"))


def _is_transport(group: Any) -> TypeGuard[Transport]:
    return all(hasattr(group, name) for name in _MEMBERS)


def resolve(group: Any = None, timeout: float | None = None) -> Transport:
    """The transport of a group.

    Args:
        group: None (the WORLD group of torch.distributed), a torch ProcessGroup, or any Transport,
            such as an `NcclCommunicator` or a member of a `SimulatedGroup`.
        timeout: seconds that one wait may take. Default: the group's own.

    Raises:
        ArgumentError: torch.distributed is not initialised, this rank is not in the group, or `group`
            is something else.
        GroupUnusableError: the group was destroyed.
    """
    if timeout is not None:
        check_timeout(timeout)
    if _is_transport(group):
        return group if timeout is None else group.with_timeout(timeout)
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "group=None is the WORLD group of torch.distributed, which is not initialised; call "
                "torch.distributed.init_process_group first, or pass a group"
            )
        group = dist.group.WORLD
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ArgumentError("group: this rank is not a member of the group")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            "group must be None, a torch.distributed ProcessGroup, an NcclCommunicator or a member of a "
            f"SimulatedGroup, got {shown(group)}"
        )
    from gck.collectives.transports.process_group import ProcessGroupTransport

    return ProcessGroupTransport.of(group, timeout)
