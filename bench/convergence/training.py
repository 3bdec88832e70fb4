"""One training: gradients of simulated ranks, which one compressor reduces, and the loss as it falls."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import gck
from bench.convergence.language import LanguageModel, Text, load_text
from gck.collectives import SimulatedGroup, all_reduce_cost, all_reduce_many_
from gck.compressor import Compressor
from gck.factored import shaped

__all__ = [
    "BASELINE",
    "CASES",
    "Case",
    "Curve",
    "Job",
    "Settings",
    "begin",
    "is_compressed",
    "sent_nbytes",
    "train",
    "train_job",
]

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
    """

    at: Callable[[int, int, int], Compressor]
    feedback: bool = True
    algorithm: str = "auto"


def _always(compressor: Compressor, **options: Any) -> Case:
    return Case(lambda step, rank, seed: compressor, **options)


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


Job = tuple[str, int, Settings]  # of `train`


def begin() -> None:
    """Of a process that trains beside others, whose parent ends all of them on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def train_job(job: Job) -> tuple[Job, Curve]:
    return job, train(*job)


@cache
def _text() -> Text:
    return load_text()


def is_compressed(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and parameter.numel() > SMALL


def train(name: str, seed: int, settings: Settings) -> Curve:
    """The loss before the first step, after each of `look_every`, and after the last.

    It ends with a loss that is not finite where weights or gradients became so. The ranks share one model,
    with which all would end a step anyway: they get the same bits.

    Raises:
        RuntimeError: they did not.
    """
    text = _text()
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    parameters = list(model.parameters())
    ranks = Ranks(name, seed, settings, parameters)
    order = text.batches(settings.steps, settings.workers, settings.batch, seed)
    held_out = text.held_out(settings.held_out)
    losses = [(0, _look(model, held_out))]
    for step in range(1, settings.steps + 1):
        read = [model.loss(*text.windows(places)) for places in order[step - 1]]
        grads = [list(torch.autograd.grad(loss, parameters)) for loss in read]
        mean = ranks.reduce(step, grads)
        if not all(bool(grad.isfinite().all()) for grad in mean):
            return [*losses, (step, math.nan)]
        for parameter, grad in zip(parameters, mean, strict=True):
            parameter.grad = grad
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        optimizer.step()
        if step % settings.look_every == 0 or step == settings.steps:
            losses.append((step, _look(model, held_out)))
    return losses


class Ranks:
    """Simulated ranks with a residual each for every parameter."""

    def __init__(self, name: str, seed: int, settings: Settings, parameters: Sequence[Tensor]) -> None:
        self.name, self.seed, self.case = name, seed, CASES[name]
        self.group = SimulatedGroup(settings.workers, timeout=300)
        self.states = [[gck.ErrorFeedback() for _ in parameters] for _ in range(settings.workers)]
        self.chosen = {
            compressed: [i for i, p in enumerate(parameters) if is_compressed(p) == compressed]
            for compressed in (True, False)
        }

    def reduce(self, step: int, grads: Sequence[list[Tensor]]) -> list[Tensor]:
        """The mean, as compressed, of what each rank has; `grads` is overwritten.

        Raises:
            RuntimeError: ranks got different bits.
        """

        def one(member: Any) -> None:
            mine, kept = grads[member.rank], self.states[member.rank]
            compressor = self.case.at(step, member.rank, self.seed)
            for compressed, chosen in self.chosen.items():
                all_reduce_many_(
                    [mine[i] for i in chosen],
                    [kept[i] for i in chosen] if self.case.feedback else None,
                    compressor,
                    member,
                    algorithm=self.case.algorithm if compressed else "dense",
                    validate="off",
                )

        self.group.run(one)
        bits = [[grad.view(torch.int32) for grad in mine] for mine in grads]
        if not all(torch.equal(a, b) for mine in bits[1:] for a, b in zip(mine, bits[0], strict=True)):
            raise RuntimeError(f"{self.name}: ranks differ after step {step}")
        return grads[0]


def _look(model: LanguageModel, held_out: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return model.loss(*held_out).item()


def sent_nbytes(name: str, settings: Settings) -> int:
    """What a rank sends in a step."""
    case, total = CASES[name], 0
    model: nn.Module = LanguageModel()
    for parameter in model.parameters():
        compressor = shaped(case.at(1, 0, 0), parameter.shape)
        algorithm = case.algorithm if is_compressed(parameter) else "dense"
        total += all_reduce_cost(compressor, [parameter.numel()], settings.workers, algorithm).nbytes
    return total
