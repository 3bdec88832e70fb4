"""Charts of a report: bars of multiples, or times by size."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.suite import GCK, short

__all__ = ["draw"]

Record = dict[str, Any]
COLORS = {GCK: "#2a6fdb"}
PEER_COLORS = ("#c9742b", "#8d8d8d", "#6b9a4f", "#9267b0", "#c2617f", "#4ba3a3")
# What bars show: the first of these that all records of a chart have.
MEASURES = {
    "times_common_input": "multiple of the time of Gaussian input",
    "multiple_of_own_floor": "multiple of the own floor: the bytes that must move, as fast as err.add_(grad)",
    "multiple_of_fp32_floor": "multiple of err.add_(grad) with grad in fp32",
}


def draw(report: Record, folder: Path) -> list[Path]:
    """A file a topic and size: a panel for each kernel and dtype; a topic of small sizes has one file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    charts: dict[str, list[Record]] = defaultdict(list)
    for record in report["records"]:
        name = record["topic"] if record["call"] else f"{record['topic']}-{short(record['n'])}"
        charts[name].append(record)
    paths = []
    for name, records in charts.items():
        figure = (_lines if records[0]["call"] else _bars)(plt, records)
        machine = report["machine"]
        figure.suptitle(
            f"{name.replace('-', ', ')}: {machine['device_name']}, {machine['threads']} CPU threads, "
            f"torch {machine['versions']['torch']}",
            fontsize=10,
        )
        paths.append(folder / f"bench-{name}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def _colors(records: list[Record]) -> dict[str, str]:
    others = dict.fromkeys(r["implementation"] for r in records if r["implementation"] != GCK)
    return {**dict(zip(others, cycle(PEER_COLORS), strict=False)), **COLORS}


def _bars(plt: Any, records: list[Record]) -> Any:
    measure = next(name for name in MEASURES if all(r.get(name) is not None for r in records))
    kernels, dtypes = (list(dict.fromkeys(r[key] for r in records)) for key in ("kernel", "grad_dtype"))
    heights = [
        max(sum(r["kernel"] == kernel and r["grad_dtype"] == dtype for r in records) for dtype in dtypes)
        for kernel in kernels
    ]
    width = 8.2 if len(dtypes) == 1 else 6.2 * len(dtypes)
    figure, grid = plt.subplots(
        len(kernels),
        len(dtypes),
        figsize=(width, 0.6 + sum(0.9 + 0.24 * height for height in heights)),
        squeeze=False,
        sharex=True,
        height_ratios=[height + 3 for height in heights],
        layout="constrained",
    )
    for axes_row, kernel in zip(grid, kernels, strict=True):
        for axes, dtype in zip(axes_row, dtypes, strict=True):
            chosen = [r for r in records if r["kernel"] == kernel and r["grad_dtype"] == dtype]
            _panel(axes, chosen, measure, f"{kernel}, {dtype} gradient")
    for axes in grid[-1]:
        axes.set_xlabel(MEASURES[measure])
    return figure


def _panel(axes: Any, records: list[Record], measure: str, title: str) -> None:
    colors = _colors(records)
    alone = {r["implementation"] for r in records} == {GCK}
    for place, record in enumerate(records):
        value = record[measure]
        # Bars begin at the floor: on a logarithmic axis there is no zero to begin at.
        axes.barh(place, value - 1, left=1, height=0.75, color=colors[record["implementation"]])
        axes.annotate(
            f"{value:.3g}",
            (max(value, 1), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    labels = [r["setting"] if alone else f"{r['implementation']}, {r['setting']}" for r in records]
    axes.set_yticks(range(len(records)), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if max(r[measure] for r in records) < 10 else "")
    axes.tick_params(axis="x", which="both", labelsize=7.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(plt: Any, records: list[Record]) -> Any:
    figure, axes = plt.subplots(figsize=(6.6, 4), layout="constrained")
    for name, color in _colors(records).items():
        points = [(r["n"], r["seconds"] * 1e6) for r in records if r["implementation"] == name]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes := sorted({r["n"] for r in records}), [short(n) for n in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("elements")
    axes.set_ylabel("microseconds, the whole call from Python")
    axes.set_title(f"{records[0]['kernel']}, {records[0]['option']} {records[0]['setting']}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
