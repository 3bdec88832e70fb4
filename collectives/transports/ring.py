"""An all-gather in a ring over gloo: every rank passes on to the next what it has got from the one before.

gloo has a ring of its own, which asks for a message when the one before has come, and waits for each in
turn. Here all are asked for as it starts: at 100 Mbit/s four ranks with 320 kB each take 84.4 ms by it and
80.9 by this one (medians of 15; ranks end 5.2 and 1.2 ms apart). Or earlier:
gloo's thread polls without end while another thread is in a call on the connection by which something comes,
and where they share a processor that other thread has to wait for the end of its time slice.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 4.1, the ring algorithm; each long message in two halves, so that one is passed on while the other
comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gck.collectives.transports.exchange import Exchange, Parts, parts

__all__ = ["Ring", "part_ends"]

TAG = 0x67636C << 4  # and numbers after it: apart from what the group's user may send
HALVE_FROM = 48 << 10  # bytes of a message; calls for halves of a shorter one cost more than they save


def part_ends(nbytes: int) -> list[int]:
    """Where the parts of a message end; the first one of two at a multiple of 16."""
    return [nbytes // 32 * 16, nbytes] if nbytes >= HALVE_FROM else [nbytes]


class Ring(Exchange):
    """The whole all-gather: `expect` it, if there is time, and `send`.

    Args:
        recv: (W, nbytes) uint8; row s becomes what rank s sends.
        check: called with (s, i) when part i of rank s's message has come; raises where it must not be passed
            on.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        recv: Tensor,
        rank: int,
        timeout: float,
        check: Callable[[int, int], None],
    ) -> None:
        super().__init__(group, None, recv, rank, timeout)
        world_size = len(recv)
        self._next, self._last = (rank + 1) % world_size, (rank - 1) % world_size
        # Whose messages come, in order.
        self._sources = [(rank - 1 - j) % world_size for j in range(world_size - 1)]
        self._check = check
        self._receiving: list[list[Any]] = []
        self._sending: list[Any] = []
        self._coming = threading.Event()

    def expect(self) -> None:
        """Asks for what will come, once; rings of a group in the order in which they will send."""
        for j in range(len(self._receiving), len(self._sources)):
            parts_of = self._parts(j, self._recv[self._sources[j]])
            self._receiving.append(self._receive_from(self._last, parts_of))

    def send(self, message: Tensor, after: Exchange | None) -> None:
        """Starts it.

        Args:
            message: (nbytes,) uint8.
            after: the one before it: between two ranks messages of one tag are told apart by their order.
                What is decoded of one ring hides behind the next; those that shared the links would all end
                at once.
        """
        self._send, self._after = message, after
        self.start()

    def await_peers(self) -> None:
        self._coming.wait()

    def _parts(self, j: int, message: Tensor) -> list[tuple[int, Tensor]]:
        """Of what is sent, or comes, as the j-th."""
        ends = part_ends(message.numel())
        return list(parts(message, ends, TAG + j * len(ends)))

    def _post(self) -> None:
        self.expect()
        with self._lock:
            if self._may_send():
                self._pass_on(self._parts(0, self._send))

    def _exchange(self) -> None:
        self._go_on()
        if not self._sending:
            self._pass_on(self._parts(0, self._send))
        self._recv[self._rank] = self._send
        for j, source in enumerate(self._sources):
            passed_on = self._parts(j + 1, self._recv[source]) if j + 1 < len(self._sources) else []
            if not passed_on:
                self._nearly.set()
            for i, work in enumerate(self._receiving[j]):
                self._await([work])
                self._coming.set()
                self._go_on()
                self._check(source, i)
                self._pass_on(passed_on[i : i + 1])
        self._await(self._sending)

    def _pass_on(self, message: Parts) -> None:
        self._sending += self._send_to(self._next, message)

    def _wake(self) -> None:
        self._coming.set()

    def _forget(self) -> None:
        self._receiving, self._sending = [], []
        self._check = lambda source, part: None  # which knows the operation, and that its tensors
