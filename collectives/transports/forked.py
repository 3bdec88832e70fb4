"""Process groups that a process has from the one it was forked from.

Their connections are the parent's, and the threads that serve them did not come along: whoever waits there,
waits for ever, and what is sent there spoils the parent's messages.
"""

from __future__ import annotations

import os
from weakref import WeakSet

import torch.distributed as dist

__all__ = ["is_inherited"]

_inherited: WeakSet[dist.ProcessGroup] = WeakSet()


def is_inherited(group: dist.ProcessGroup) -> bool:
    """Whether the group was made before this process was forked."""
    return group in _inherited


def _note() -> None:
    if dist.is_available() and dist.is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)
