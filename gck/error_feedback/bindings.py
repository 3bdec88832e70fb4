"""What a residual belongs to, so that it is not added to anything else."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ServerBinding", "ShardBinding"]


class ServerBinding(NamedTuple):
    """What a server residual belongs to: the shard of this rank in a world cut into units."""

    rank: int
    world_size: int
    unit: int


class ShardBinding(NamedTuple):
    """What all residuals of a rank belong to where the ranks of a node share a tensor: the shard of local
    rank `rank`, of `numel` elements cut into `world_size` shards of whole units."""

    numel: int
    rank: int
    world_size: int
    unit: int
