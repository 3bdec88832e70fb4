"""Gradients and residuals to select from: the common case, and those that are made to be hard.

Each input is (grad, err), both fp32, of any size, always the same for the same size. Where a density matters
it is DENSITY, the ratio that they are measured at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench import captured

__all__ = ["DENSITY", "GAUSSIAN", "INPUTS", "LINE", "count_of", "make", "sampled"]

GAUSSIAN = "Gaussian"
DENSITY = 0.01
EMBEDDING_WIDTH = 512
LINE = 16  # elements that bindings/cpu/topk_guess.cpp samples side by side

Pair = tuple[Tensor, Tensor]


def count_of(n: int) -> int:
    """How many of n entries DENSITY is."""
    return max(1, math.ceil(DENSITY * n))


def make(name: str, n: int) -> Pair:
    """(grad, err) of an input."""
    grad, err = INPUTS[name](n)
    return grad.contiguous(), err.contiguous()


def _generator(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def _normal(n: int) -> Tensor:
    return torch.randn(n, generator=_generator(n))


def _uniform(n: int) -> Tensor:
    """In (0, 1)."""
    return torch.rand(n, generator=_generator(n)).clamp_(2**-25, 1 - 2**-24)


def _alone(grad: Tensor) -> Pair:
    """A first step: nothing is left from before."""
    return grad, torch.zeros_like(grad)


def _gaussian(n: int) -> Pair:
    generator = _generator(n)
    grad = torch.randn(n, generator=generator)
    return grad, torch.randn(n, generator=generator) * 0.5


def _laplace(n: int) -> Pair:
    centred = _uniform(n).sub_(0.5)
    return _alone(-centred.sign() * torch.log1p(-2 * centred.abs()).clamp_(min=-60))


def _cauchy(n: int) -> Pair:
    return _alone(_uniform(n).sub_(0.5).mul_(math.pi).tan_())


def _log_normal(n: int) -> Pair:
    magnitude = _normal(n).exp_()
    return _alone(torch.where(_uniform(n) < 0.5, -magnitude, magnitude))


def _embedding(density: float, spread: bool) -> Callable[[int], Pair]:
    """Rows of an embedding table: most tokens do not occur in a batch, and have no gradient at all."""

    def grad_of(n: int) -> Pair:
        rows = -(-n // EMBEDDING_WIDTH)
        used = max(1, round(density * rows))
        grad = torch.zeros(rows, EMBEDDING_WIDTH)
        where = (
            torch.randperm(rows, generator=_generator(n))[:used] if spread else rows // 3 + torch.arange(used)
        )
        grad[where] = _normal(used * EMBEDDING_WIDTH).view(used, -1)
        return _alone(grad.view(-1)[:n].clone())

    return grad_of


def _periodic(n: int) -> Pair:
    """Large every so many entries as lie between the lines of a sample."""
    grad = _normal(n)
    grad[:: _lines_apart(n) * LINE] *= 100
    return _alone(grad)


def _two_values(n: int) -> Pair:
    """One entry in eight is 2, the others are 1; signs at random."""
    u = _uniform(n)
    return _alone(torch.where(u < 1 / 8, 2.0, 1.0) * torch.where((u * 1024).int() % 2 == 0, 1.0, -1.0))


def _outlier(n: int) -> Pair:
    grad = _normal(n)
    grad[n // 2] = 3e38
    return _alone(grad)


def _none_finite(n: int) -> Pair:
    u = _uniform(n)
    return _alone(torch.where(u < 0.4, math.nan, torch.where(u < 0.7, math.inf, -math.inf)))


def _nonzeros(part: float) -> Callable[[int], Pair]:
    """As many entries that are not zero as `part` times those that are kept; zeros of both signs."""

    def grad_of(n: int) -> Pair:
        grad = torch.full((n,), -0.0)
        grad[::3] = 0.0
        where = torch.randperm(n, generator=_generator(n))[: round(part * count_of(n))]
        grad[where] = _normal(where.numel()) + 4
        # Not zeros: adding 0.0 would make -0.0 positive.
        return grad, torch.full((n,), -0.0)

    return grad_of


def _lines_apart(n: int) -> int:
    """Lines from one sampled line to the next, as `lines_for` of bindings/cpu/topk_guess.cpp places them."""
    most = max(1, min(4096, n // (64 * LINE)))
    wanted = max((n * math.sqrt(DENSITY) / 18) ** (2 / 3), math.sqrt(n / 23))
    return max(1, n // LINE // max(1, min(int(wanted), most)))


def sampled(n: int, draw: int) -> Tensor:
    """(lines, 16) indices of the entries that the CPU's guess looks at: who has read the source knows them.

    Draw 1 is what it looks at when draw 0 misled it.
    """
    apart = _lines_apart(n)
    lines = np.arange(n // LINE // apart, dtype=np.uint64)
    x = (lines | np.uint64(draw << 32)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    jitter = (x ^ x >> np.uint64(31)) % np.uint64(apart)
    first = torch.from_numpy(((lines * np.uint64(apart) + jitter) * np.uint64(LINE)).astype(np.int64))
    return (first[:, None] + torch.arange(LINE)).clamp_(max=n - 1)


def _where_sampled(factor: float, draws: int) -> Callable[[int], Pair]:
    """Larger or smaller where the guess looks than anywhere else: the guess is far too high or too low."""

    def grad_of(n: int) -> Pair:
        grad = _normal(n)
        for draw in range(draws):
            grad[sampled(n, draw).view(-1)] *= factor
        return _alone(grad)

    return grad_of


def _captured(step: int) -> Callable[[int], Pair]:
    """What a training has at a step, repeated end to end until there are n entries."""

    def pair_of(n: int) -> Pair:
        grad, err = captured.at_step(step)
        times = -(-n // grad.numel())
        return grad.repeat(times)[:n].clone(), err.repeat(times)[:n].clone()

    return pair_of


INPUTS: dict[str, Callable[[int], Pair]] = {
    GAUSSIAN: _gaussian,
    "Laplace": _laplace,
    "Cauchy": _cauchy,
    "log-normal": _log_normal,
    "embedding, 1% of rows": _embedding(DENSITY, spread=True),
    "embedding, 0.5% of rows": _embedding(DENSITY / 2, spread=True),
    "embedding, rows in a block": _embedding(DENSITY, spread=False),
    "sorted up": lambda n: _alone(_normal(n).abs_().sort().values),
    "sorted down": lambda n: _alone(_normal(n).abs_().sort(descending=True).values),
    "periodic": _periodic,
    "constant": lambda n: _alone(torch.full((n,), -0.25)),
    "two values": _two_values,
    "all zero": lambda n: _alone(torch.zeros(n)),
    "one huge outlier": _outlier,
    "none finite": _none_finite,
    "denormals": lambda n: _alone(_normal(n) * 1e-41),
    "k non-zeros": _nonzeros(1),
    "k/2 non-zeros": _nonzeros(0.5),
    "large where sampled": _where_sampled(100, draws=1),
    "small where sampled": _where_sampled(0.01, draws=1),
    "large in both samples": _where_sampled(100, draws=2),
    "small in both samples": _where_sampled(0.01, draws=2),
}
if captured.available():
    INPUTS |= {f"demo, step {step}": _captured(step) for step in captured.STEPS}
