"""An all-to-all in rounds over gloo: in round i every rank sends to the one i places on, and to no other.

gloo's own all-to-all sends to all at once. Where messages are large and links slow, some of the streams that
meet in a receiver's link come to their end early, and the links that carried them idle while others are late;
and a switch that has no room for what meets there drops packets, which are sent again. A round costs the
latency of a message, so that small messages go all at once.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 4.3, the pairwise-exchange algorithm for long messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gck.collectives.work.queue import join_at_exit
from gck.errors import GroupUnusableError

__all__ = ["ROTATE_FROM", "Rotation", "order_of_rows", "rotation"]

ROTATE_FROM = 16 << 10  # bytes of a message; at 100 Mbit/s they take 1.3 ms
DIVIDE_FROM = 64 << 10  # bytes of a message that goes in parts
END = 16 << 10  # bytes of the first of them, and about those of the last
TAG = 0x67636B  # apart from what the group's user may send; of parts the numbers after it


def part_ends(nbytes: int) -> list[int]:
    """Where the parts of a message end; multiples of 16 but the last. A short message is one part.

    A long one has a first and a last part of at most `END` bytes. When the first has come, peers have begun;
    and the next round begins before the last has, so that links are not idle while threads wake up.
    """
    if nbytes < DIVIDE_FROM:
        return [nbytes]
    return [END, (nbytes - END) // 16 * 16, nbytes]


def parts(message: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The parts of a flat uint8 message, as views, each with its tag: so that none is taken for a message."""
    ends = part_ends(message.numel())
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield (TAG + 1 + i if len(ends) > 1 else TAG), message[start:end]


def order_of_rows(rank: int, world_size: int) -> Iterator[int]:
    """Rows of a rank's message as it sends them; its own, which it keeps, comes last."""
    for i in range(1, world_size + 1):
        yield (rank + i) % world_size


def rotation(rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(whom to send to, whom to receive from) of each round."""
    for i in range(1, world_size):
        yield (rank + i) % world_size, (rank - i) % world_size


class Rotation:
    """The whole all-to-all, under way on a thread of its own; in the manner of torch.distributed's works.

    gloo cannot be asked whether a send or a receive has ended, only be waited for, and whoever waits cannot
    compute meanwhile.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Tensor,
        recv: Tensor,
        rank: int,
        timeout: float,
        after: Rotation | None,
        as_made: bool = False,
    ) -> None:
        """
        Args:
            timeout: seconds that every round may take, from when its row is there.
            after: the rotation before this one, all of whose messages must be posted first: between two ranks
                messages of one tag are told apart by their order.
            as_made: each row is sent once `made` has been called with it.

        `start` starts it.
        """
        self._group: Any = group
        self._send: Any = send
        self._recv: Any = recv
        self._rounds, self._timeout = rotation(rank, len(send)), timeout
        self._rank, self._after = rank, after
        self._made = [threading.Event() for _ in send] if as_made else []
        self._stopped = False
        self._coming = [threading.Event() for _ in send[1:]]
        self._nearly = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> None:
        # No daemon: such a thread that comes back from C++ when the interpreter has ended takes it down. The
        # interpreter joins others before it ends, but not those that a daemon starts after that.
        thread = threading.Thread(target=self._run, name="gck rotation", daemon=False)
        join_at_exit(thread)
        thread.start()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until its end, which the timeout of rounds bounds."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def coming(self, j: int) -> None:
        """Waits until the message of round j has begun to come, or nothing more will; not at all where j < 0.

        Of a message that is not divided nobody sees its beginning: until this rank's own is on its way.
        """
        if j >= 0:
            self._coming[j].wait()

    def nearly(self) -> None:
        """Waits until all that another rotation would wait for has been received but for the last part."""
        self._nearly.wait()
        if self._error is not None:
            raise self._error

    def made(self, row: int) -> None:
        """This row may be sent."""
        self._made[row].set()

    def stop(self) -> None:
        """Of this one and those before it no further round begins; the one under way may last its timeout."""
        self._stopped, after = True, self._after
        for made in self._made:
            made.set()  # of those that are not nothing will be sent
        if after is not None:
            after.stop()

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after.nearly()
            late: list[Any] = []  # what the round before this one has not waited for
            until = 0.0
            for j, (to, source) in enumerate(self._rounds):
                self._go_on()
                receiving = [
                    dist.irecv(part, group=self._group, tag=tag, group_src=source)
                    for tag, part in parts(self._recv[source])
                ]
                self._await_row(to)
                sending = [
                    dist.isend(part, group=self._group, tag=tag, group_dst=to)
                    for tag, part in parts(self._send[to])
                ]
                first, *others = receiving
                if not others:
                    self._coming[j].set()
                self._await(late, until)
                until = time.monotonic() + self._timeout
                self._await([first], until)
                self._coming[j].set()
                self._await(others[:-1], until)
                late = [*others[-1:], *sending]
            self._nearly.set()
            self._await_row(self._rank)
            self._recv[self._rank] = self._send[self._rank]
            self._await(late, until)
        except BaseException as error:
            self._error = error
        finally:
            # Whoever keeps this for its end must not keep the group, nor the memory.
            self._after = self._group = self._send = self._recv = None
            for event in (*self._coming, self._nearly, self._done):
                event.set()

    def _await(self, works: list[Any], until: float) -> None:
        for work in works:
            if work is not None:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))

    def _go_on(self) -> None:
        if self._stopped:
            raise GroupUnusableError("all_to_all: the group was given up meanwhile")

    def _await_row(self, row: int) -> None:
        if self._made:
            self._made[row].wait()
            self._go_on()
