"""A small model under DDP, its data, and how it is trained and compared: for tests on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.cases import same_bytes

TINY_BUCKETS = 0.004  # MB, as DDP counts them: about one weight a bucket
EVERYTHING: dict[str, Any] = {"bypass_numel": 0, "bypass_1d": False}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 47), nn.Tanh(), nn.Linear(47, 40), nn.Tanh(), nn.Linear(40, 3)).to(
        dtype
    )


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 33, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(batch(step, dtype)).square().mean()


def train(model: nn.Module, steps: range, loss_of: Callable[[nn.Module, int], Tensor] = loss_of) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bytes(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def assert_same_on_all_ranks(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.detach().float().view(-1) for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(same_bytes(flat, other) for other in others)
