"""What gloo does and torch.distributed does not say."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["close_connections"]

TAG = 0x67636E << 4  # apart from what others ask for
AT_ONCE = timedelta(milliseconds=1)


def close_connections(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Ends whatever is under way on the group, here and between its peers and this rank.

    gloo has no such call. But where somebody has waited for a message for too long, it closes all of the
    group's connections, so that other waits end as well ("Application timeout caused pair closure" here,
    "Connection closed by peer" there): so a message is waited for that nobody sends. Otherwise peers would
    wait for their timeouts, and the end of this process for the threads that wait here.
    """
    backend: Any = group
    for peer in range(world_size):
        if peer != rank:
            # Where this connection is lost already, the call fails, and does not close the others.
            with suppress(RuntimeError, ValueError):
                backend.recv([torch.empty(1, dtype=torch.uint8)], peer, TAG).wait(AT_ONCE)
