"""One training: gradients of simulated ranks, which one compressor reduces, and the loss as it falls."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import gck
from bench.convergence.cases import CASES, Curve, Settings, is_compressed, look
from bench.convergence.language import LanguageModel, Text, load_text
from bench.convergence.local import train_locally
from gck.collectives import SimulatedGroup, all_reduce_many_

__all__ = ["Job", "Ranks", "begin", "train", "train_job"]

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


def train(name: str, seed: int, settings: Settings) -> Curve:
    """The loss before the first step, after each of `look_every`, and after the last.

    It ends with a loss that is not finite where weights or gradients became so. The ranks share one model,
    with which all would end a step anyway: they get the same bits.

    Raises:
        RuntimeError: they did not.
    """
    text = _text()
    if CASES[name].local_steps > 1:
        return train_locally(name, seed, settings, text)
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    parameters = list(model.parameters())
    ranks = Ranks(name, seed, settings, parameters)
    order = text.batches(settings.steps, settings.workers, settings.batch, seed)
    held_out = text.held_out(settings.held_out)
    losses = [(0, look(model, held_out))]
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
            losses.append((step, look(model, held_out)))
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
