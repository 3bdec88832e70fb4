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
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gck.collectives.transports.exchange import Exchange, parts

__all__ = ["ROTATE_FROM", "Rotation", "order_of_rows", "part_ends", "rotation"]

ROTATE_FROM = 16 << 10  # bytes of a message; at 100 Mbit/s they take 1.3 ms
DIVIDE_FROM = 64 << 10  # bytes of a message that goes in parts
END = 16 << 10  # bytes of the first of them, and about those of the last
TAG = (
    0x67636B << 4
)  # of a whole message, apart from what the group's user may send; of parts the numbers after


def part_ends(nbytes: int) -> list[int]:
    """Where the parts of a message end; multiples of 16 but the last. A short message is one part.

    A long one has a first and a last part of at most `END` bytes. When the first has come, peers have begun;
    and the next round begins before the last has, so that links are not idle while threads wake up.
    """
    if nbytes < DIVIDE_FROM:
        return [nbytes]
    return [END, (nbytes - END) // 16 * 16, nbytes]


def parts_of(message: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The parts of a flat uint8 message, as views, each with its tag: so that none is taken for a message."""
    ends = part_ends(message.numel())
    return parts(message, ends, TAG + (len(ends) > 1))


def order_of_rows(rank: int, world_size: int) -> Iterator[int]:
    """Rows of a rank's message as it sends them; its own, which it keeps, comes last."""
    for i in range(1, world_size + 1):
        yield (rank + i) % world_size


def rotation(rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(whom to send to, whom to receive from) of each round."""
    for i in range(1, world_size):
        yield (rank + i) % world_size, (rank - i) % world_size


class Rotation(Exchange):
    """The whole all-to-all, under way.

    Args:
        send: (W, nbytes) uint8; row d goes to rank d.
        recv: (W, nbytes) uint8; row s becomes what rank s sends.
        timeout: seconds that every round may take, from when its row is there.
        after: the one before it: between two ranks messages of one tag are told apart by their order.
        as_made: each row is sent once `made` has been called with it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Tensor,
        recv: Tensor,
        rank: int,
        timeout: float,
        after: Exchange | None,
        as_made: bool = False,
    ) -> None:
        super().__init__(group, send, recv, rank, timeout, after)
        self._rounds = list(rotation(rank, len(send)))
        # Of the first round, where it needed not wait for the thread.
        self._receiving: list[Any] = []
        self._sending: list[Any] = []
        self._made = [threading.Event() for _ in send] if as_made else []
        self._coming = [threading.Event() for _ in send[1:]]

    def coming(self, j: int) -> None:
        """Waits until the message of round j has begun to come, or nothing more will; not at all where j < 0.

        Of a message that is not divided nobody sees its beginning: until this rank's own is on its way.
        """
        if j >= 0:
            self._coming[j].wait()

    def await_peers(self) -> None:
        self.coming(0)

    def made(self, row: int) -> None:
        """This row may be sent."""
        with self._lock:
            if row == self._rounds[0][0] and self._may_send():
                self._sending = self._send_row(row)
        self._made[row].set()

    def _post(self) -> None:
        with self._lock:
            if self._may_send():
                to, source = self._rounds[0]
                self._receiving = self._receive_row(source)
                if not self._made:
                    self._sending = self._send_row(to)

    def _exchange(self) -> None:
        late: list[Any] = []  # what the round before this one has not waited for
        until = 0.0
        for j, (to, source) in enumerate(self._rounds):
            self._go_on()
            # No sooner: gloo sends nothing before it is waited for, so that a rank which is ahead does not
            # get in the way of what others send in their round.
            first, *others = (self._receiving if j == 0 else []) or self._receive_row(source)
            self._await_row(to)
            sending = (self._sending if j == 0 else []) or self._send_row(to)
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

    def _wake(self) -> None:
        for event in (*self._coming, *self._made):  # of rows that are not made nothing will be sent
            event.set()

    def _forget(self) -> None:
        self._receiving, self._sending = [], []

    def _receive_row(self, row: int) -> list[Any]:
        return self._receive_from(row, parts_of(self._recv[row]))

    def _send_row(self, row: int) -> list[Any]:
        return self._send_to(row, parts_of(self._send[row]))

    def _await_row(self, row: int) -> None:
        if self._made:
            self._made[row].wait()
            self._go_on()
