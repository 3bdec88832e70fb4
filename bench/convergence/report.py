"""What trainings say of a compressor, as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.convergence.training import BASELINE, Settings, sent_nbytes

__all__ = ["Curve", "draw", "equal_step", "summary", "table"]

Curve = Sequence[tuple[int, float]]  # of (step, loss)
Record = dict[str, Any]


def summary(curves: Mapping[str, Sequence[Curve]], settings: Settings) -> list[Record]:
    """One record a compressor; each seed's loss is compared with the dense one of the same seed."""
    dense = curves[BASELINE]
    mean_dense = _mean(dense)
    records = []
    for name, found in curves.items():
        last = [curve[-1][1] for curve in found]
        nbytes, numel = sent_nbytes(name, settings)
        records.append(
            {
                "name": name,
                "nbytes": nbytes,
                "numel": numel,
                "loss": _spread(last),
                "above_dense": _spread([a - b[-1][1] for a, b in zip(last, dense, strict=True)]),
                "dense_steps": equal_step(mean_dense, statistics.fmean(last)),
                "curves": [list(curve) for curve in found],
            }
        )
    return records


def equal_step(dense: Curve, loss: float) -> float:
    """After how many dense steps the loss is first as low: between two looks, on the line between them."""
    for (before, high), (after, low) in pairwise(dense):
        if low <= loss:
            return before if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return dense[-1][0]


def _mean(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    return [(looks[0][0], statistics.fmean(loss for _, loss in looks)) for looks in zip(*curves, strict=True)]


def _spread(values: Sequence[float]) -> Record:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def table(records: Sequence[Record], settings: Settings) -> Table:
    seeds = len(records[0]["curves"])
    shown = Table(
        title=f"{records[0]['numel']:,} parameters, {settings.workers} ranks, {settings.steps} steps of "
        f"AdamW; mean and standard deviation of {seeds} seeds"
    )
    for column in ("", "a rank sends in a step", "loss", "above dense", "as dense after"):
        shown.add_column(column, justify="right" if column else "left")
    for r in records:
        above = r["above_dense"]
        shown.add_row(
            r["name"],
            f"{r['nbytes'] / 1e3:,.0f} kB",
            f"{r['loss']['mean']:.3f} ± {r['loss']['standard_deviation']:.3f}",
            "" if r["name"] == BASELINE else f"{above['mean']:+.3f} ± {above['standard_deviation']:.3f}",
            f"{r['dense_steps']:.0f} steps",
        )
    return shown


def draw(records: Sequence[Record], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for place, r in enumerate(records):
        mean = _mean(r["curves"])
        dense = r["name"] == BASELINE
        axes.plot(
            [step for step, _ in mean],
            [loss for _, loss in mean],
            label=r["name"],
            color="black" if dense else colours(place),
            linewidth=2.2 if dense else 1.2,
            linestyle="--" if "no residuals" in r["name"] else "-",
        )
    top = _mean(records[0]["curves"])
    axes.set_ylim(0.97 * min(loss for r in records for _, loss in _mean(r["curves"])), top[1][1] * 1.05)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on held-out text, nats a byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
