"""Draws docs/kernels/quantize.png: `python docs/figures/quantize.py`, in the repository's root."""

from __future__ import annotations

from typing import Any

import drawing
import numpy as np
import torch
from drawing import BLUE, DARK, GREY, LIGHT_BLUE, ORANGE, SMALL

import gck

SIZE = 256  # elements of the chunk
SETTINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "2 bits, mean": {"bits": 2, "scale": "mean"},
}
LOW = 2  # a level, in multiples of the scale; the next is LOW + 1
SEEDS = 2000


def levels(axes: Any) -> None:
    """A histogram of acc, and under it where each setting puts its elements."""
    acc = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    counts, edges = np.histogram(acc.numpy(), 48)
    axes.bar(edges[:-1], counts / counts.max() * 1.25, np.diff(edges), align="edge", color=GREY)
    for row, (name, options) in enumerate(SETTINGS.items(), start=1):
        err = torch.zeros(SIZE)
        sent = gck.decompress(gck.quantize_ef_(acc, err, chunk_size=SIZE, **options))
        taken, often = (x.numpy() for x in sent.unique(return_counts=True))
        color = ORANGE if "mean" in name else BLUE
        axes.vlines(taken, -row, -row + 0.72 * often / often.max(), color=color, linewidth=1.6)
        axes.axhline(-row, color=GREY, linewidth=0.8, zorder=0)
        lost = float(err.square().sum() / acc.square().sum())
        beside(axes, 0.2 - row, f"{lost:.1%}" if lost > 1e-3 else f"{lost:.3%}")
    beside(axes, 0.3, "squares\nleft in err")
    axes.set_yticks([0.3, *(0.2 - row for row in range(1, 5))], ["acc", *SETTINGS])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("acc, and what it decodes to")
    drawing.title(axes, f"the levels that a chunk of {SIZE} normal entries takes, by how often")
    drawing.without_frame(axes, "top", "right", "left")


def beside(axes: Any, y: float, text: str) -> None:
    axes.text(1.02, y, text, va="center", transform=axes.get_yaxis_transform(), fontsize=SMALL)


def stochastic(axes: Any) -> None:
    """Elements between two levels of 4 bits: nearest, at random, and at random over many seeds."""
    acc = torch.linspace(LOW, LOW + 1, 64)
    acc = torch.cat([torch.tensor([7.0]), acc])  # the largest, so that the scale is 1
    nearest = gck.decompress(gck.quantize(acc, bits=4, chunk_size=SIZE))[1:]
    drawn = [
        gck.decompress(gck.quantize(acc, bits=4, chunk_size=SIZE, rounding="stochastic", seed=seed))[1:]
        for seed in range(SEEDS)
    ]
    acc = acc[1:]
    axes.plot(acc, acc, color="black", linewidth=0.8, linestyle=":")
    axes.plot(acc, nearest, color=DARK, linewidth=1.2, drawstyle="steps-mid", label="to nearest")
    axes.scatter(acc, drawn[0], s=12, color=LIGHT_BLUE, label="stochastic, one seed")
    axes.scatter(acc, torch.stack(drawn).mean(0), s=8, color=BLUE, label=f"mean of {SEEDS:,} seeds")
    axes.set_xticks([LOW, LOW + 0.5, LOW + 1])
    axes.set_yticks([LOW, LOW + 1])
    axes.set_xlabel("acc / scale")
    axes.set_ylabel("decoded / scale")
    axes.legend(frameon=False, fontsize=SMALL, loc="lower right", bbox_to_anchor=(1.04, 0.06))
    drawing.title(axes, "between two levels of 4 bits")
    drawing.without_frame(axes, "top", "right")


def draw() -> Any:
    figure, axes = drawing.panels(1.5, 1)
    levels(axes[0])
    stochastic(axes[1])
    return figure


if __name__ == "__main__":
    drawing.save(draw(), "quantize")
