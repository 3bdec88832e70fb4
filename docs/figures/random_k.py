"""Draws docs/kernels/random_k.png: `python docs/figures/random_k.py`, in the repository's root."""

from __future__ import annotations

import math
from typing import Any

import drawing
import numpy as np
import torch
from drawing import BLUE, LIGHT_BLUE, ORANGE, PALE_BLUE, SMALL

import gck
from gck.kernels.random_k import reference

N, K = 50, 6  # no multiple: strata of 9 and of 8
SEED = 34
SEEDS = 20_000


def chosen(seed: int) -> np.ndarray[Any, Any]:
    """(N,) where gck puts the values of a payload of ones."""
    dense: np.ndarray[Any, Any] = gck.decompress(gck.SeededValues(torch.ones(K), seed, N)).numpy()
    return dense


def ring(axes: Any) -> None:
    turn, _ = reference.ring(SEED, N, K)
    places = (chosen(SEED).nonzero()[0] - turn) % N
    lengths = [N // K + (i < N % K) for i in range(K)]
    stratum = np.repeat(np.arange(K), lengths)
    angle = 2 * math.pi / N
    for place in range(N):
        color = ORANGE if place in places else (PALE_BLUE, LIGHT_BLUE)[stratum[place] % 2]
        axes.bar((place + 0.5) * angle, 0.3, angle * 0.86, bottom=0.8, color=color)
        if place in places:
            axes.text(
                (place + 0.5) * angle, 1.22, str((place + turn) % N),
                ha="center", va="center", fontsize=SMALL, color=ORANGE,
            )  # fmt: skip
    for i, end in enumerate(np.cumsum(lengths)):
        middle = (end - lengths[i] / 2) * angle
        axes.text(middle, 0.64, str(i), ha="center", va="center", fontsize=SMALL, color=BLUE)
    start = (N - turn) % N * angle
    for at, text in ((0, "position 0"), (start, "element 0")):
        axes.plot([at, at], [0.74, 1.3], color="black", linewidth=0.9)
        side = "left" if math.sin(at) > -1e-9 else "right"
        axes.text(at, 1.38, text, ha=side, va="center", fontsize=SMALL)
    axes.text(0, 0, f"turned by\n{turn} of {N}", ha="center", va="center", fontsize=SMALL)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.42)
    axes.axis("off")
    drawing.title(axes, f"{N} positions: one of each stratum is chosen")


def histogram(axes: Any) -> None:
    counts = np.sum([chosen(seed) for seed in range(SEEDS)], axis=0)
    share = K / N
    spread = 2 * math.sqrt(share * (1 - share) / SEEDS)
    axes.bar(range(N), counts / SEEDS, 0.8, color=PALE_BLUE)
    axes.axhspan(share - spread, share + spread, color=BLUE, alpha=0.3, linewidth=0)
    axes.axhline(share, color=BLUE, linewidth=1)
    text = f"k / n = {share:g}, and two standard deviations"
    axes.text(N - 0.5, share * 1.07, text, ha="right", fontsize=SMALL, color=BLUE)
    axes.set_xlim(-0.8, N - 0.2)
    axes.set_ylim(0, share * 1.3)
    axes.set_xlabel("element")
    axes.set_ylabel("share of seeds that choose it")
    drawing.title(axes, f"every element is equally likely: {SEEDS:,} seeds")
    drawing.without_frame(axes, "top", "right")


def draw() -> Any:
    figure, axes = drawing.panels(1, 1.25)
    spec = axes[0].get_subplotspec()
    axes[0].remove()
    ring(figure.add_subplot(spec, projection="polar"))
    histogram(axes[1])
    return figure


if __name__ == "__main__":
    drawing.save(draw(), "random_k")
