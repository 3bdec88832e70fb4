"""Draws docs/kernels/sign.png: `python docs/figures/sign.py`, in the repository's root."""

from __future__ import annotations

from typing import Any

import drawing
import torch
from drawing import BLUE, ORANGE, PALE_BLUE, SMALL

import gck

SIZE = 32  # the smallest chunk, whose signs are one word
PALE_ORANGE = "#f3d9c3"


def made() -> tuple[torch.Tensor, gck.PackedSigns, torch.Tensor]:
    """(acc, what gck sends of it, what is left)."""
    acc = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    err = torch.zeros(SIZE)
    payload = gck.sign_ef_(acc, err, SIZE)
    return acc, payload, err


def word(axes: Any) -> None:
    acc, payload, err = made()
    scale, bits = float(payload.scales[0]), int(payload.words[0])
    places = range(SIZE)
    axes.bar(places, acc.numpy(), 0.72, color=[BLUE if x >= 0 else ORANGE for x in acc])
    axes.scatter(places, (acc - err).numpy(), s=9, color="black", zorder=3)
    axes.hlines(0, -0.8, SIZE - 0.3, color="black", linewidth=0.6)
    for level, text in ((scale, "+scale"), (-scale, "-scale")):
        axes.hlines(level, -0.8, SIZE - 0.3, color="black", linewidth=0.6, linestyle=":")
        axes.text(SIZE, level, text, va="center", fontsize=SMALL)
    low = float(acc.min()) - 0.55
    for place in places:
        bit = bits >> place & 1
        axes.text(place, low, str(bit), ha="center", fontsize=SMALL, color=BLUE if bit else ORANGE)
    axes.set_ylim(low - 0.2)
    axes.set_xlim(-0.8, SIZE + 3.2)
    axes.set_xticks([0, 8, 16, 24, 31])
    axes.set_xlabel("element, and bit of the word")
    axes.set_ylabel("acc")
    drawing.title(axes, f"{SIZE} signs are the word {bits:#010x}; dots: what it decodes to")
    drawing.without_frame(axes, "top", "right")


def tree(axes: Any) -> None:
    acc, payload, _ = made()
    row = acc.abs()
    for level in range(SIZE.bit_length()):
        count, half = len(row), len(row) // 2
        for place in range(count):
            color = PALE_BLUE if place < half or count == 1 else PALE_ORANGE
            axes.barh(level, 0.86, height=0.5, left=place, color=color)
        if half:
            arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.22", "color": ORANGE}
            ends = (half / 2, level - 0.28), (half * 1.5, level - 0.28)
            axes.annotate("", ends[0], xytext=ends[1], arrowprops=arrow)
            text = f"{count} magnitudes" if level == 0 else f"{count} sums"
        else:
            text = f"{float(row[0]):.3f} / {SIZE} = {float(payload.scales[0]):.4f}, the scale"
        axes.text(max(count, 1) + 0.5, level, text, va="center", fontsize=SMALL)
        row = row[:half] + row[half:]
    axes.set_ylim(SIZE.bit_length() - 0.6, -0.95)
    axes.set_xlim(-0.3, SIZE + 8)
    axes.set_xticks([])
    axes.set_yticks([])
    drawing.title(axes, "the upper half is added to the lower one, until one number is left")
    drawing.without_frame(axes)


def draw() -> Any:
    figure, axes = drawing.panels(1, 1)
    word(axes[0])
    tree(axes[1])
    return figure


if __name__ == "__main__":
    drawing.save(draw(), "sign")
