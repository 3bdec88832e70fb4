"""Simulated nodes of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from gck import HierarchicalGroup
from gck.collectives import SimulatedGroup

T = TypeVar("T")


def on_grid(grid: tuple[int, int], fn: Callable[[HierarchicalGroup], T]) -> list[T]:
    """fn of every rank's end; in rank order."""
    nodes, local = grid
    group = SimulatedGroup(nodes * local, timeout=60)
    return group.run(lambda member: fn(HierarchicalGroup.from_group(member, local_world_size=local)))


def gradient(rank: int, step: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)
