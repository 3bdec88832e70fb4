"""One training with many local steps between two exchanges: each simulated rank has a model of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

import gck
from bench.convergence.cases import CASES, SMALL, Curve, Settings, look
from bench.convergence.language import LanguageModel, Text
from gck.collectives import SimulatedGroup

__all__ = ["train_locally"]


def train_locally(name: str, seed: int, settings: Settings, text: Text) -> Curve:
    """As `bench.convergence.training.train`. Between two exchanges the loss is that of rank 0; the training
    ends with one.

    Raises:
        RuntimeError: ranks had different bits after an exchange.
    """
    case = CASES[name]
    torch.manual_seed(seed)
    model = LanguageModel()
    models = [model, *(copy.deepcopy(model) for _ in range(1, settings.workers))]
    inner = [torch.optim.AdamW(each.parameters(), weight_decay=0.01) for each in models]
    group = SimulatedGroup(settings.workers, timeout=300)

    def begin(member: Any) -> Any:
        options: dict[str, Any] = {
            "algorithm": case.algorithm,
            "bypass_numel": SMALL,
            "optimizer": case.outer,
        }
        compressor = case.at(1, member.rank, seed)
        return gck.diloco.OuterOptimizer(
            models[member.rank], compressor, case.local_steps, group=member, validate="off", **options
        )

    outer = group.run(begin)
    order = text.batches(settings.steps, settings.workers, settings.batch, seed)
    held_out = text.held_out(settings.held_out)
    losses = [(0, look(model, held_out))]
    for step in range(1, settings.steps + 1):
        for each, optimizer, places in zip(models, inner, order[step - 1], strict=True):
            optimizer.zero_grad()
            each.loss(*text.windows(places)).backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            optimizer.step()
        if step % case.local_steps == 0 or step == settings.steps:
            group.run(lambda member: outer[member.rank].synchronize())
            if not all(_same(model, each) for each in models[1:]):
                raise RuntimeError(f"{name}: ranks differ after step {step}")
        if step % settings.look_every == 0 or step == settings.steps:
            losses.append((step, look(model, held_out)))
            if not math.isfinite(losses[-1][1]):
                break
    return losses


def _same(a: nn.Module, b: nn.Module) -> bool:
    both = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in both)
