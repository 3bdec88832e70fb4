"""Draws docs/kernels/topk.png: `python docs/figures/topk.py`, in the repository's root."""

from __future__ import annotations

from typing import Any

import drawing
import numpy as np
import torch
from drawing import GREY, LIGHT_BLUE, ORANGE, PALE, PALE_BLUE

from bench import inputs
from bench.guess_trials import clustered, guess

N = 1_000_000
READ, WRITE, WINNERS, LOSERS = LIGHT_BLUE, ORANGE, drawing.BLUE, PALE_BLUE
# What each step does with the four pieces of memory: (read, written) share of each. Shares of what has few
# entries are drawn larger than they are, or they could not be seen.
MEMORY = ("grad", "err", "list", "payload")
STEPS: dict[str, tuple[tuple[float, float], ...]] = {
    "guess": ((0.06, 0), (0.06, 0), (0, 0), (0, 0)),
    "stream": ((1, 0), (1, 1), (0, 0.3), (0, 0)),
    "refine": ((0, 0), (0, 0), (0.3, 0), (0, 0)),
    "emit": ((0, 0), (0, 0.1), (0.3, 0), (0, 0.2)),
}


def distribution(axes: Any) -> None:
    grad, err = inputs.make(inputs.GAUSSIAN, N)
    keys = ((grad + err).view(torch.int32) & 0x7FFFFFFF).numpy()
    k = inputs.count_of(N)
    low, _ = guess(keys[inputs.sampled(N, 0).numpy()], N, k, clustered)
    magnitude = np.sort(keys.view(np.float32))[::-1]
    guessed, exact = float(np.int32(low).view(np.float32)), float(magnitude[k - 1])
    edges = np.linspace(0, float(magnitude[0]), 160)
    counts, _ = np.histogram(magnitude, edges)
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        middle = (left + right) / 2
        color = WINNERS if middle >= exact else LOSERS if middle >= guessed else GREY
        axes.bar(left, count, right - left, align="edge", color=color)
    listed = int((magnitude >= guessed).sum())
    for x, text, side in ((guessed - 0.05, "guess", "right"), (exact + 0.05, "threshold", "left")):
        axes.text(x, 0.93, text, ha=side, transform=axes.get_xaxis_transform(), fontsize=drawing.SMALL)
    for x in (guessed, exact):
        axes.axvline(x, color="black", linewidth=0.9)
    axes.text(
        exact + 0.35, 0.62, f"{k:,} winners\nof {listed:,} listed", transform=axes.get_xaxis_transform(),
        fontsize=drawing.SMALL, color=WINNERS,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0)
    axes.set_xlabel("|grad + err|")
    axes.set_ylabel("entries")
    drawing.title(axes, f"{N:,} normal entries, ratio {inputs.DENSITY:.0%}")
    drawing.without_frame(axes, "top", "right")


def passes(axes: Any) -> None:
    for row, (step, touched) in enumerate(STEPS.items()):
        for column, (read, written) in enumerate(touched):
            axes.barh(row, 0.9, height=0.56, left=column, color=PALE)
            for share, color, shift in ((read, READ, 0.14), (written, WRITE, -0.14)):
                scattered = step == "guess" or (step == "emit" and MEMORY[column] == "err")
                parts = 6 if scattered and share else 1
                for part in range(parts):
                    left = column + 0.9 * part / parts
                    axes.barh(row - shift, 0.9 * share / parts, height=0.28, left=left, color=color)
    axes.set_yticks(range(len(STEPS)), STEPS)
    axes.invert_yaxis()
    axes.set_xticks([column + 0.45 for column in range(len(MEMORY))], MEMORY)
    axes.tick_params(length=0)
    axes.set_xlim(-0.05, len(MEMORY))
    drawing.legend(axes, {"read": READ, "written": WRITE}, below=-0.1)
    drawing.title(axes, "what each step touches (small shares enlarged)")
    drawing.without_frame(axes)


def draw() -> Any:
    figure, axes = drawing.panels(1, 1)
    distribution(axes[0])
    passes(axes[1])
    return figure


if __name__ == "__main__":
    drawing.save(draw(), "topk")
