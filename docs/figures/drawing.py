"""What the figures of docs/kernels have in common: colors, and how they are made and saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for what they take from bench

BLUE, PALE_BLUE, LIGHT_BLUE, ORANGE = "#2a6fdb", "#c9d8f0", "#8fb4ea", "#d98b4a"
DARK, GREY, PALE = "#8d8d8d", "#e3e3e3", "#f1f1f1"
SMALL = 9  # size of a text


def panels(*widths: float, **options: Any) -> tuple[Any, Any]:
    """(figure, its axes side by side), as wide as a page."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(
        1, len(widths), figsize=(11, 3.6), layout="constrained", width_ratios=widths, **options
    )


def title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10, y=1)


def without_frame(axes: Any, *sides: str) -> None:
    axes.spines[list(sides or ("top", "right", "bottom", "left"))].set_visible(False)


def legend(axes: Any, colors: dict[str, str], below: float) -> None:
    """What colors mean, in a row under the axes."""
    handles = [mpl.patches.Patch(color=color, label=label) for label, color in colors.items()]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, below),
        ncols=len(colors),
        frameon=False,
    )


def save(figure: Any, name: str) -> None:
    """To docs/kernels, or to the folder that the command line names."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/kernels"
    figure.savefig(folder / f"{name}.png", dpi=130)
