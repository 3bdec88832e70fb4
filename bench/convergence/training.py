"""One training: gradients of simulated ranks, which one compressor reduces, and the loss as it falls."""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = ["BASELINE", "CASES", "Case", "Settings", "sent_nbytes", "train"]

BASELINE = "dense"
SMALL = 1024  # elements of a parameter that is not compressed, as in the hooks; nor is one of one dimension


@dataclass(frozen=True)
class Case:
    """One way to reduce gradients.

    Attributes:
        at: the compressor of a step, and of a rank, which roundings at random must not share.
        feedback: whether ranks keep what they did not send.
        algorithm: of the all-reduce.
    """

    at: Callable[[int, int], Compressor]
    feedback: bool = True
    algorithm: str = "auto"


CASES = {
    BASELINE: Case(lambda step, rank: gck.Sign(), algorithm="dense"),
    "8 bits": Case(lambda step, rank: gck.Quantize(bits=8)),
    "4 bits": Case(lambda step, rank: gck.Quantize(bits=4)),
    "4 bits, stochastic": Case(
        lambda step, rank: gck.Quantize(bits=4, rounding="stochastic", seed=1024 * step + rank)
    ),
    "2 bits, means": Case(lambda step, rank: gck.Quantize(bits=2, scale="mean")),
    "signs": Case(lambda step, rank: gck.Sign()),
    "top-k 1 %": Case(lambda step, rank: gck.TopK(ratio=0.01)),
    "top-k 10 %": Case(lambda step, rank: gck.TopK(ratio=0.1)),
    "chunk top-k 64 of 4096, 2 bits": Case(
        lambda step, rank: gck.ChunkTopK(k=64, chunk_size=4096, value_bits=2)
    ),
    "random-k 1 %": Case(lambda step, rank: gck.RandomK(ratio=0.01, seed=step)),
    "low rank, 4": Case(lambda step, rank: gck.LowRank(rank=4, seed=0)),
    "signs, no residuals": Case(lambda step, rank: gck.Sign(), feedback=False),
    "top-k 1 %, no residuals": Case(lambda step, rank: gck.TopK(ratio=0.01), feedback=False),
}


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common."""

    workers: int = 4
    batch: int = 4  # windows of a worker
    steps: int = 500
    # The learning rate rises for so long. It does not fall: losses of different steps are compared.
    warmup_steps: int = 25
    learning_rate: float = 2e-3
    look_every: int = 25
    held_out: int = 256  # windows


@cache
def _text() -> Text:
    return load_text()


def _is_compressed(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and parameter.numel() > SMALL


def train(name: str, seed: int, settings: Settings) -> list[tuple[int, float]]:
    """(step, loss of the held-out bytes), before the first step and after each of `look_every`.

    The ranks share one model, with which all would end a step anyway: they get the same bits.

    Raises:
        RuntimeError: they did not.
    """
    case, text = CASES[name], _text()
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    parameters = list(model.parameters())
    group = SimulatedGroup(settings.workers, timeout=300)
    states = [[gck.ErrorFeedback() for _ in parameters] for _ in range(settings.workers)]
    order = text.batches(settings.steps, settings.workers, settings.batch, seed)
    held_out = text.held_out(settings.held_out)
    losses = [(0, _look(model, held_out))]
    for step in range(1, settings.steps + 1):
        grads = [
            list(torch.autograd.grad(model.loss(*text.windows(places)), parameters))
            for places in order[step - 1]
        ]

        def reduce(member: Any, step: int = step, grads: Any = grads) -> None:
            mine, kept, compressor = grads[member.rank], states[member.rank], case.at(step, member.rank)
            for compressed in (True, False):
                chosen = [i for i, p in enumerate(parameters) if _is_compressed(p) == compressed]
                all_reduce_many_(
                    [mine[i] for i in chosen],
                    [kept[i] for i in chosen] if case.feedback else None,
                    compressor,
                    member,
                    algorithm=case.algorithm if compressed else "dense",
                )

        group.run(reduce)
        if not all(torch.equal(a, b) for mine in grads[1:] for a, b in zip(mine, grads[0], strict=True)):
            raise RuntimeError(f"{name}: ranks differ after step {step}")
        for parameter, grad in zip(parameters, grads[0], strict=True):
            parameter.grad = grad
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps)
        optimizer.step()
        if step % settings.look_every == 0:
            losses.append((step, _look(model, held_out)))
    return losses


def _look(model: LanguageModel, held_out: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return model.loss(*held_out).item()


def sent_nbytes(name: str, settings: Settings) -> tuple[int, int]:
    """What a rank sends in a step, and the elements of the model."""
    case, total, numel = CASES[name], 0, 0
    model: nn.Module = LanguageModel()
    for parameter in model.parameters():
        compressor = shaped(case.at(1, 0), parameter.shape)
        algorithm = case.algorithm if _is_compressed(parameter) else "dense"
        total += all_reduce_cost(compressor, [parameter.numel()], settings.workers, algorithm).nbytes
        numel += parameter.numel()
    return total, numel
