"""What trainings say of a compressor, as a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.convergence.cases import BASELINE, Curve, Settings, sent_nbytes

__all__ = ["draw", "steps_of_dense", "summary", "table"]

Record = dict[str, Any]
Budgets = Mapping[int, float]  # the last loss of dense trainings, by how many steps they had


def summary(
    curves: Mapping[str, Sequence[Curve]], budgets: Sequence[Budgets], settings: Settings
) -> list[Record]:
    """One record a compressor. What a training reached is compared with dense ones of the same seed.

    Args:
        curves: by the compressor's name, one a seed.
        budgets: one a seed.
    """
    records = []
    for name, found in curves.items():
        last = [curve[-1][1] for curve in found]
        dense = [curve[-1][1] for curve in curves[BASELINE]]
        steps = [steps_of_dense(of_seed, loss) for of_seed, loss in zip(budgets, last, strict=True)]
        records.append(
            {
                "name": name,
                "nbytes": sent_nbytes(name, settings),
                "loss": _spread(last),
                "above_dense": _spread([a - b for a, b in zip(last, dense, strict=True)]),
                # A mean of numbers, and of "fewer than were tried", is neither.
                "dense_steps": _spread(steps) if all(steps) or not any(steps) else None,
                "curves": [[[step, _number(loss)] for step, loss in curve] for curve in found],
            }
        )
    return records


def steps_of_dense(budgets: Budgets, loss: float) -> float:
    """How many steps a dense training needs to end with this loss: on the line between two that were made.

    More than any of them had is infinite; fewer is 0; of a loss that is no number it is not a number.
    """
    if math.isnan(loss):
        return math.nan
    ends = sorted(budgets.items())
    if loss > ends[0][1]:
        return 0.0
    for (before, high), (after, low) in pairwise(ends):
        if low <= loss <= high:
            return before + (after - before) * (high - loss) / (high - low) if high > low else before
    return math.inf


def _spread(values: Sequence[float]) -> Record | None:
    """None where one of them is no number, or beyond what was measured."""
    if not all(map(math.isfinite, values)):
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def _number(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def table(records: Sequence[Record], settings: Settings) -> Table:
    seeds = len(records[0]["curves"])
    shown = Table(
        title=f"{settings.workers} ranks, {settings.steps} steps of AdamW; mean and standard deviation of "
        f"{seeds} seeds"
    )
    for column in ("", "a rank sends", "of dense", "loss", "above dense", "as dense in"):
        shown.add_column(column, justify="right" if column else "left")
    for r in records:
        dense = r["name"] == BASELINE
        shown.add_row(
            r["name"],
            f"{r['nbytes'] / 1e3:,.0f} kB",
            f"{r['nbytes'] / records[0]['nbytes']:.1%}",
            _shown(r["loss"], ".3f") or "diverged",
            "" if dense else _shown(r["above_dense"], "+.3f"),
            "" if dense else _steps(r),
        )
    return shown


def _steps(record: Record) -> str:
    spread = record["dense_steps"]
    if spread is None:  # diverged, or no worse than dense
        return ""
    return f"{_shown(spread, '.0f')} steps" if spread["mean"] else "fewer than tried"


def _shown(spread: Record | None, form: str) -> str:
    if spread is None:
        return ""
    return f"{spread['mean']:{form}} ± {spread['standard_deviation']:{form.lstrip('+')}}"


def draw(records: Sequence[Record], settings: Settings, path: Path) -> None:
    """Loss above the dense one, a row a compressor; to the left is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    shown = [r for r in records[1:] if r["above_dense"] is not None]
    for place, r in enumerate(shown):
        above, colour = r["above_dense"], "#c0392b" if "no residuals" in r["name"] else "#2a6fdb"
        axes.errorbar(
            above["mean"], place, xerr=above["standard_deviation"], fmt="o", color=colour, capsize=3
        )
    names = [f"{r['name']}: {r['nbytes'] / records[0]['nbytes']:.1%}" for r in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color="#8d8d8d", linewidth=0.8)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel("loss above dense, nats a byte")
    of_all = f"{settings.steps} steps, {settings.workers} ranks"
    figure.suptitle(f"{of_all}; beside the names, what a rank sends of dense bytes", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
