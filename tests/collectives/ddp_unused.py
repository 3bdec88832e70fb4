"""Branches of a model that ranks use in some steps: for tests on two real ranks, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedbackMap
from gck.integrations import ddp
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import EVERYTHING, TINY_BUCKETS, batch

# Of each step, what each rank uses.
USED = [["left", ""], ["left right"] * 2, ["", ""], ["right"] * 2, ["", "left right"]]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(33, 40), nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x: Tensor, branches: str) -> Tensor:
        x = self.stem(x)
        for name in branches.split():
            x = x + getattr(self, name)(x)
        return x


def residuals_of_unused_parameters_stay(group: Any, device: torch.device) -> None:
    """DDP discards what is averaged of what no rank used; what one rank used counts on all of them."""

    def back(model: nn.Module, step: int) -> None:
        model.zero_grad()
        model(batch(step).to(device), USED[step][dist.get_rank()]).square().mean().backward()

    for cap, checksum, warm_up in ((TINY_BUCKETS, True, 0), (25, False, 1)):
        twin, states, model = Branches().to(device), ErrorFeedbackMap(), Branches().to(device)
        model = DistributedDataParallel(
            model, process_group=group, bucket_cap_mb=cap, find_unused_parameters=True
        )
        state = ddp.register(model, TopK(ratio=0.1), warm_up, checksum=checksum, **EVERYTHING)
        for step, branches in enumerate(USED):
            back(model, step)
            back(twin, step)
            algorithm = "dense" if step < warm_up else "auto"
            for (name, parameter), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
                if name.split(".")[0] in f"stem {' '.join(branches)}":
                    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    all_reduce_(grad, states[name], TopK(ratio=0.1), group, algorithm=algorithm)
                    assert same_bytes(grad, theirs.grad), (name, step)
                else:
                    assert theirs.grad is None
                if name in states and states[name].worker is not None:
                    assert same_bytes(states[name].worker, state.residuals[name].worker), (name, step)
        assert all(residuals.worker.any() for name, residuals in states.items() if "weight" in name)
        assert sorted(states) == sorted(state.residuals)
