"""What gloo does and torch.distributed does not say."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["carries_cpu_tensors", "close_connections"]

TAG = 0x67636A << 4  # and the numbers after it, below those of rounds and rings: of messages nobody sends
AT_ONCE = timedelta(milliseconds=1)


def carries_cpu_tensors(group: dist.ProcessGroup) -> bool:
    """Whether what lies on the host goes by gloo; other tensors may go by another backend."""
    try:
        return bool(group._get_backend(torch.device("cpu")).name() == "gloo")
    except RuntimeError:  # no backend takes such tensors
        return False


def close_connections(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Ends what is under way on the group, here and between its peers and this rank.

    gloo has no such call. But where somebody has waited for a message for too long, it closes all of the
    group's connections, so that other waits end as well ("Application timeout caused pair closure" here,
    "Connection closed by peer" there): so a message is waited for that nobody sends. Otherwise peers would
    wait for their timeouts, and the end of this process for the threads that wait here.

    Whoever waits for a message of which a part has come already is not told by gloo, here or there, and goes
    on until its timeout. Asking again, to see whether a connection is lost, would not do: what is asked goes
    to the peer, and where that has ended after sending, the answer of its system discards what is on its way.
    """
    backend: Any = group
    # A group has connections by each interface, and tags say which of them a message takes.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").count(",") + 1
    for peer in range(world_size):
        for tag in range(TAG, TAG + interfaces):
            if peer != rank:
                # Where this connection is lost already, the call fails, and does not close the others.
                with suppress(RuntimeError, ValueError):
                    never = torch.empty(1, dtype=torch.uint8, device="cpu")
                    backend.recv([never], peer, tag).wait(AT_ONCE)
