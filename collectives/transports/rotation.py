"""An all-to-all in rounds over gloo: in round i every rank sends to the one i places on, and to no other.

gloo's own all-to-all sends to all at once. Where messages are large and links slow, some of the streams that
meet in a receiver's link come to their end early, and the links that carried them idle while others are late:
with 100 Mbit/s links and 4 ranks it takes about 1.5 times what the bytes need, rounds about 1.1 times
(`python -m bench.link`). A round costs the latency of a message, so that small messages go all at once.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 4.3, the pairwise-exchange algorithm for long messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

__all__ = ["ROTATE_FROM", "Rotation", "rotation"]

ROTATE_FROM = 256 << 10  # bytes of a message; at 1 Gbit/s they take 2 ms
TAG = 0x67636B  # apart from what the group's user may send


def rotation(rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(whom to send to, whom to receive from) of each round."""
    for i in range(1, world_size):
        yield (rank + i) % world_size, (rank - i) % world_size


class Rotation:
    """The whole all-to-all, its first round started; `wait` as torch.distributed's works have it."""

    def __init__(self, group: dist.ProcessGroup, send: Tensor, recv: Tensor, rank: int) -> None:
        self._group, self._send, self._recv = group, send, recv
        self._rounds = rotation(rank, len(send))
        recv[rank] = send[rank]
        self._start()

    def wait(self, timeout: timedelta) -> None:
        """Every round may take `timeout`."""
        while self._works:
            for work in self._works:
                work.wait(timeout)
            self._start()

    def _start(self) -> None:
        """The next round, if there is one."""
        self._works: list[dist.Work] = []
        for to, source in itertools.islice(self._rounds, 1):
            receiving = dist.irecv(self._recv[source], group=self._group, tag=TAG, group_src=source)
            sending = dist.isend(self._send[to], group=self._group, tag=TAG, group_dst=to)
            self._works = [work for work in (receiving, sending) if work is not None]
