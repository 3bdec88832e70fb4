"""What is compared: ways to reduce gradients, and what all trainings have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gck
from bench.convergence.language import LanguageModel
from gck.collectives import all_reduce_cost
from gck.compressor import Compressor
from gck.factored import shaped

__all__ = ["BASELINE", "CASES", "SMALL", "Case", "Curve", "Settings", "is_compressed", "look", "sent_nbytes"]

BASELINE = "dense"
SMALL = 1024  # elements of a parameter that is not compressed, as by the hooks; nor is one of one dimension
Curve = list[tuple[int, float]]  # (step, loss of the held-out bytes)


@dataclass(frozen=True)
class Case:
    """One way to reduce gradients.

    Attributes:
        at: the compressor of a step, of a rank, and of a training. Roundings at random are each rank's own,
            choices at random those of all.
        feedback: whether ranks keep what they did not send.
        algorithm: of the all-reduce.
        local_steps: of each rank by itself, between two exchanges of what they have changed.
        outer: makes the outer optimizer of these; None: the average is taken as it is.
    """

    at: Callable[[int, int, int], Compressor]
    feedback: bool = True
    algorithm: str = "auto"
    local_steps: int = 1
    outer: Callable[..., torch.optim.Optimizer] | None = None


def _always(compressor: Compressor, **options: Any) -> Case:
    return Case(lambda step, rank, seed: compressor, **options)


LOCAL = 15
NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)  # DiLoCo's
SPARSE_LOCO = gck.ChunkTopK(64, 4096, value_bits=2, decay=0.95)
CASES = {
    BASELINE: _always(gck.Sign(), algorithm="dense"),
    "8 bits": _always(gck.Quantize(bits=8)),
    "4 bits": _always(gck.Quantize(bits=4)),
    "4 bits, stochastic": Case(
        lambda step, rank, seed: gck.Quantize(4, rounding="stochastic", seed=_number(seed, step, rank))
    ),
    "2 bits, means": _always(gck.Quantize(bits=2, scale="mean")),
    "signs": _always(gck.Sign()),
    "top-k 10 %": _always(gck.TopK(ratio=0.1)),
    "top-k 1 %": _always(gck.TopK(ratio=0.01)),
    "chunk top-k 64 of 4096, 2 bits": _always(gck.ChunkTopK(64, 4096, value_bits=2)),
    "random-k 1 %": Case(lambda step, rank, seed: gck.RandomK(ratio=0.01, seed=_number(seed, step))),
    "low rank, 4": Case(lambda step, rank, seed: gck.LowRank(rank=4, seed=seed)),
    "signs, no residuals": _always(gck.Sign(), feedback=False),
    "top-k 1 %, no residuals": _always(gck.TopK(ratio=0.01), feedback=False),
    "15 local steps": _always(gck.Sign(), algorithm="dense", local_steps=LOCAL),
    "15 local steps, Nesterov": _always(gck.Sign(), algorithm="dense", local_steps=LOCAL, outer=NESTEROV),
    "15 local steps, 4 bits": _always(gck.Quantize(bits=4), local_steps=LOCAL),
    "15 local steps, 4 bits, Nesterov": _always(gck.Quantize(bits=4), local_steps=LOCAL, outer=NESTEROV),
    "15 local steps, 64 of 4096, 2 bits": _always(SPARSE_LOCO, algorithm="one_phase", local_steps=LOCAL),
}


def _number(seed: int, step: int, rank: int = 0) -> int:
    return (seed << 48) + (step << 16) + rank


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common. The learning rate rises over `rising` steps, and then falls to 0."""

    workers: int = 4
    batch: int = 4  # windows of a worker
    steps: int = 300
    rising: int = 25
    learning_rate: float = 2e-3
    look_every: int = 50
    held_out: int = 512  # windows

    def learning_rate_at(self, step: int) -> float:
        left = (self.steps - step + 1) / max(1, self.steps - self.rising)
        return self.learning_rate * min(1.0, step / self.rising, left)


def is_compressed(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and parameter.numel() > SMALL


def look(model: LanguageModel, held_out: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return model.loss(*held_out).item()


def sent_nbytes(name: str, settings: Settings) -> int:
    """What a rank sends in a step, in the mean of those between two exchanges."""
    case, total = CASES[name], 0
    model: nn.Module = LanguageModel()
    for parameter in model.parameters():
        compressor = shaped(case.at(1, 0, 0), parameter.shape)
        algorithm = case.algorithm if is_compressed(parameter) else "dense"
        total += all_reduce_cost(compressor, [parameter.numel()], settings.workers, algorithm).nbytes
    return total // case.local_steps
