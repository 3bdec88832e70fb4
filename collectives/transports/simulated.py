"""W ranks in one process, a thread each: for tests, and for worlds larger than one machine."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gck.collectives.transports import CallLog, Started, check_timeout
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GroupUnusableError,
    PeerLostError,
)
from gck.values import check_flags, plain_int

__all__ = ["SimulatedGroup", "SimulatedMember"]

T = TypeVar("T")


@dataclass
class _Round:
    """One operation: what each rank posted (private copies, so posts never change), who has read it, and
    why it failed: a rank that comes late must not find it complete when others have given it up.

    What is the same for all ranks is done once, not by each of them: in a world of 1024 once is 1024 steps.
    """

    posts: dict[int, tuple[str, Tensor | None]] = field(default_factory=dict)
    readers: int = 0
    failure: str | None = None
    alike: bool = False  # once all have posted: whether they agree on what they call
    joining: threading.Lock = field(default_factory=threading.Lock)
    joined: Tensor | None = None

    def join(self, how: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """What the first rank makes of all posts, in rank order."""
        with self.joining:
            if self.joined is None:
                posts = [self.posts[rank][1] for rank in range(len(self.posts))]
                self.joined = how([post for post in posts if post is not None])
                if self.joined.is_cuda:
                    # Others read it on streams of their own.
                    torch.cuda.current_stream(self.joined.device).synchronize()
            if self.joined.is_cuda:
                self.joined.record_stream(torch.cuda.current_stream(self.joined.device))
            return self.joined


class SimulatedGroup:
    """A group of `world_size` ranks that live in this process.

    A rank that leaves `run` while others wait for it counts as a lost peer; a rank that does not come
    within `timeout` seconds as a timeout. Either spoils the group, as it does with real processes.

    Args:
        world_size: number of ranks, at least 1.
        timeout: seconds that one wait may take.
        shared_gathers: an all-gather returns one tensor to all ranks, which none may write to: a world of
            1024 may have no room for a copy each.

    Raises:
        ArgumentError, DtypeError: world_size or timeout out of range, or shared_gathers no bool.
    """

    def __init__(self, world_size: int, timeout: float = 60.0, *, shared_gathers: bool = False) -> None:
        world_size = plain_int(world_size)
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
            raise ArgumentError(f"SimulatedGroup: world_size must be a positive int, got {world_size!r}")
        check_flags("SimulatedGroup", shared_gathers=shared_gathers)
        self.world_size = world_size
        self.shared_gathers = shared_gathers
        self._condition = threading.Condition()
        self._rounds: dict[int, _Round] = {}
        self._departed: dict[int, str] = {}
        self._unusable: dict[int, str] = {}  # by rank: each learns of a failure in its own call
        self._bytes_sent, self._messages_sent = [0] * world_size, [0] * world_size
        self._splits: dict[tuple[int, int], SimulatedGroup] = {}
        self._children: list[tuple[list[int], SimulatedGroup]] = []  # with the ranks that are in them
        self.members: Sequence[SimulatedMember] = tuple(
            SimulatedMember(self, rank, check_timeout(timeout)) for rank in range(world_size)
        )

    @property
    def bytes_sent(self) -> tuple[int, ...]:
        """Bytes that each rank has sent to others so far; a dense all-reduce counts as a ring."""
        return tuple(self._bytes_sent)

    @property
    def messages_sent(self) -> tuple[int, ...]:
        """Messages that each rank has sent to others so far; a dense all-reduce counts as a ring."""
        return tuple(self._messages_sent)

    def _sent(self, rank: int, messages: int, nbytes: int) -> None:
        self._messages_sent[rank] += messages
        self._bytes_sent[rank] += nbytes

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Calls fn(member, *args) on every rank's thread; the results, in rank order.

        A rank leaves when its asynchronous collectives have ended, too.

        Raises:
            GroupUnusableError: an earlier failure spoilt the group.
            Exception: the first one that a rank raised; the other ranks are released.
        """
        if self._unusable:
            reason = next(iter(self._unusable.values()))
            raise GroupUnusableError(f"run: the group cannot be used any more ({reason}); make a new one")
        self._begin()
        results: list[Any] = [None] * self.world_size
        errors: list[BaseException] = []

        def rank_main(member: SimulatedMember) -> None:
            reason = "it returned"
            try:
                results[member.rank] = fn(member, *args)
                member.calls.queue.drain()
            except BaseException as error:
                reason = f"it raised {type(error).__name__}: {error}"
                errors.append(error)
            finally:
                self._depart(member.rank, reason)

        threads = [
            threading.Thread(target=rank_main, args=(member,), name=f"rank {member.rank}", daemon=True)
            for member in self.members
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for member in self.members:
            member.calls.queue.drain()  # of a rank that raised: fails, for the others have left
            member.calls.queue.end()
        if errors:
            raise errors[0]
        return results

    def _begin(self) -> None:
        """Everybody is back, but those who failed."""
        self._rounds.clear()
        self._splits.clear()
        self._departed = {rank: f"it failed: {error}" for rank, error in self._unusable.items()}
        for member in self.members:
            member._tickets.clear()
        for _, child in self._children:
            child._begin()

    def _depart(self, rank: int, reason: str) -> None:
        """Lets those who wait for `rank`, here or in a group that was split off, know that it is gone."""
        with self._condition:
            self._departed.setdefault(rank, reason)
            self._condition.notify_all()
            children = list(self._children)
        for ranks, child in children:
            if rank in ranks:
                child._depart(ranks.index(rank), reason)

    def _split(self, number: int, color: int, ranks: list[int], timeout: float) -> SimulatedGroup:
        """The group of `ranks`, made by the first of them that comes."""
        with self._condition:
            child = self._splits.get((number, color))
            if child is None:
                child = SimulatedGroup(len(ranks), timeout, shared_gathers=self.shared_gathers)
                self._splits[number, color] = child
                self._children.append((ranks, child))
            return child

    def _post(self, member: SimulatedMember, kind: str, send: Tensor | None) -> int:
        """Posts a copy of this rank's tensor; the number of the round."""
        rank = member.rank
        own = None if send is None else send.detach().clone()
        if own is not None and own.is_cuda:
            # Peers may read it on streams of their own, and be at it when it is freed.
            torch.cuda.current_stream(own.device).synchronize()
        with self._condition:
            if rank in self._unusable:
                raise GroupUnusableError(
                    f"{kind}: the group cannot be used any more ({self._unusable[rank]}); make a new one"
                )
            number = len(member._tickets)
            member._tickets.append(kind)
            current = self._rounds.setdefault(number, _Round())
            current.posts[rank] = (kind, own)
            if len(current.posts) == self.world_size:
                current.alike = len({(kind, _shape(post)) for kind, post in current.posts.values()}) == 1
                self._condition.notify_all()
        return number

    def _collect(self, member: SimulatedMember, number: int) -> _Round:
        """A round, once every rank has posted to it, and the same operation."""
        rank = member.rank
        with self._condition:
            current = self._rounds[number]
            kind, own = current.posts[rank]
            self._wait(member, kind, current)
            current.readers += 1
            if current.readers == self.world_size:
                del self._rounds[number]
        if not current.alike:
            other, (their_kind, post) = next(
                (other, post)
                for other, post in sorted(current.posts.items())
                if (post[0], _shape(post[1])) != (kind, _shape(own))
            )
            raise self._spoil(
                rank,
                CollectiveMismatchError(
                    f"rank {rank} calls {kind} with {_shape(own)}, rank {other} calls {their_kind} "
                    f"with {_shape(post)}"
                ),
            )
        return current

    def _wait(self, member: SimulatedMember, kind: str, current: _Round) -> None:
        where, deadline = f"{kind} on rank {member.rank}", time.monotonic() + member.timeout
        while current.failure is not None or len(current.posts) < self.world_size:
            missing = [other for other in range(self.world_size) if other not in current.posts]
            gone = [
                f"rank {other} left: {self._departed[other]}" for other in missing if other in self._departed
            ]
            left = deadline - time.monotonic()
            error: Exception | None = None
            if member.rank in self._unusable:
                raise GroupUnusableError(f"{where}: the group was given up ({self._unusable[member.rank]})")
            if current.failure is not None:
                error = PeerLostError(f"{where}: a peer gave up: {current.failure}")
            elif gone:
                error = PeerLostError(f"{where}: {gone[0]}")
            elif left <= 0:
                error = CollectiveTimeoutError(
                    f"{where}: no answer from ranks {missing} within {member.timeout:g} s"
                )
            if error is not None:
                current.failure = current.failure or str(error)
                raise self._spoil(member.rank, error)
            self._condition.wait(left)

    def _spoil(self, rank: int, error: Exception) -> Exception:
        """Makes the group unusable for `rank`, and lets those that wait for it know."""
        with self._condition:
            self._unusable.setdefault(rank, str(error))
            self._departed.setdefault(rank, f"it failed: {error}")
            self._condition.notify_all()
        return error


class SimulatedMember:
    """One rank of a `SimulatedGroup`; implements `Transport`."""

    def __init__(self, group: SimulatedGroup, rank: int, timeout: float) -> None:
        self.group = group
        self._rank = rank
        self._timeout = timeout
        self._calls = CallLog()
        self._tickets: list[str] = []  # operations begun; shared by the copies that with_timeout makes

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self.group.world_size

    @property
    def timeout(self) -> float:
        return self._timeout

    @property
    def calls(self) -> CallLog:
        return self._calls

    def with_timeout(self, seconds: float) -> SimulatedMember:
        member = copy.copy(self)
        member._timeout = check_timeout(seconds)
        return member

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        return self.start_all_gather_bytes(send).wait()

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        return self.start_all_to_all_bytes(send).wait()

    def start_all_gather_bytes(self, send: Tensor) -> Started:
        def gathered(rows: Tensor) -> Tensor:
            peers = self.world_size - 1
            self.group._sent(self._rank, peers, peers * send.numel())
            return rows if self.group.shared_gathers else rows.clone()

        return self._start("all_gather", send, gathered)

    def start_all_to_all_bytes(self, send: Tensor) -> Started:
        if send.dim() != 2 or send.shape[0] != self.world_size:
            raise ArgumentError(
                f"all_to_all_bytes: send must have {self.world_size} rows, got {tuple(send.shape)}"
            )

        def swapped(rows: Tensor) -> Tensor:
            peers = self.world_size - 1
            self.group._sent(self._rank, peers, peers * send.shape[1])
            return rows[:, self._rank].clone()

        return self._start("all_to_all", send, swapped)

    def all_reduce(self, tensor: Tensor) -> None:
        current = self.group._collect(self, self.group._post(self, "all_reduce", tensor))
        peers = self.world_size - 1
        nbytes = 2 * tensor.numel() * tensor.element_size() * peers // self.world_size
        self.group._sent(self._rank, 2 * peers, nbytes)
        tensor.copy_(current.join(_sum))

    def barrier(self) -> None:
        self.group._collect(self, self.group._post(self, "barrier", None))

    def synchronize(self) -> None:
        """Nothing: every operation has waited for its end."""

    def abort(self, reason: str) -> None:
        self.group._spoil(self._rank, PeerLostError(f"rank {self._rank} aborted: {reason}"))
        self._calls.queue.end()

    def split(self, color: int) -> SimulatedMember:
        """This rank's member of a new group: of the ranks that give the same colour, in rank order.

        All ranks call it. Within `run` of this group, the new one is used like any other.
        """
        current = self.group._collect(self, self.group._post(self, "split", torch.tensor([color])))
        colors = current.join(torch.stack).view(-1).tolist()
        ranks = [rank for rank, other in enumerate(colors) if other == color]
        group = self.group._split(len(self._tickets), color, ranks, self._timeout)
        return group.members[ranks.index(self._rank)]

    def _start(self, kind: str, send: Tensor, result: Callable[[Tensor], Tensor]) -> Started:
        return _Posted(self, self.group._post(self, kind, send), result)


@dataclass(frozen=True)
class _Posted:
    """An operation that waits for the others' posts; `result` makes of all of them what this rank gets."""

    member: SimulatedMember
    number: int
    result: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.result(self.member.group._collect(self.member, self.number).join(torch.stack))


def _sum(rows: list[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _shape(post: Tensor | None) -> str:
    return "nothing" if post is None else f"{tuple(post.shape)} of {post.dtype}"
