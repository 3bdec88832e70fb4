"""An all-to-all in rounds over gloo: in round i every rank sends to the one i places on, and to no other.

gloo's own all-to-all sends to all at once. Where messages are large and links slow, some of the streams that
meet in a receiver's link come to their end early, and the links that carried them idle while others are late:
with 100 Mbit/s links and 4 ranks it takes about 1.5 times what the bytes need, rounds about 1.1 times
(`python -m bench.link`). A round costs the latency of a message, so that small messages go all at once.

Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 4.3, the pairwise-exchange algorithm for long messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

__all__ = ["ROTATE_FROM", "Exchange", "rotation"]

ROTATE_FROM = 256 << 10  # bytes of a message; at 1 Gbit/s they take 2 ms
TAG = 0x67636B  # apart from what the group's user may send


def rotation(rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(whom to send to, whom to receive from) of each round."""
    for i in range(1, world_size):
        yield (rank + i) % world_size, (rank - i) % world_size


class Exchange:
    """One round, started; `wait` as torch.distributed's works have it."""

    def __init__(self, group: dist.ProcessGroup, send: Tensor, to: int, recv: Tensor, source: int) -> None:
        self._recv = dist.irecv(recv, group=group, tag=TAG, group_src=source)
        self._send = dist.isend(send, group=group, tag=TAG, group_dst=to)

    def wait(self, timeout: timedelta) -> None:
        for work in (self._recv, self._send):
            if work is not None:
                work.wait(timeout)
