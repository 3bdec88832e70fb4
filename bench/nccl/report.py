"""Records, tables and the picture of `python -m bench.nccl`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["draw", "record_of", "show", "size_text"]

Record = dict[str, Any]
COLORS = {"gck": "#2a6fdb", "gck, without a wait": "#7fb0f5", "gck over torch.distributed": "#6b9a4f"}
OTHERS = ("#c9742b", "#8d8d8d", "#9267b0")
LATENCY = 1 << 20  # bytes; up to here times are what matters, beyond it bandwidths
REFERENCE = "torch.distributed"


def record_of(event: Record, world_size: int) -> Record:
    """What is known of one method at one size; algbw and busbw in bytes a second, see `bench.nccl.tasks`."""
    seconds = statistics.median(event["seconds"])
    algbw = event["nbytes"] / seconds
    return {
        "task": event["task"],
        "method": event["method"],
        "nbytes": event["nbytes"],
        "world_size": world_size,
        "seconds": seconds,
        "all_seconds": event["seconds"],
        "calls": event["calls"],
        "algbw": algbw,
        "busbw": algbw * event["busbw_factor"],
    }


def size_text(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def show(records: Sequence[Record], title: str, absent: dict[str, str], console: Console) -> None:
    """A table a task; what the title says of the run stands over each."""
    for task in dict.fromkeys(r["task"] for r in records):
        table = Table(title=f"{task}: {title}")
        for column in ("size", "", "time", "spread", "algbw", "busbw", "x torch"):
            table.add_column(column, justify="left" if not column else "right")
        chosen = [r for r in records if r["task"] == task]
        for i, r in enumerate(chosen):
            times, reference = r["all_seconds"], _reference(r, chosen)
            table.add_row(
                size_text(r["nbytes"]),
                r["method"],
                f"{1e6 * r['seconds']:,.1f} us",
                f"{1e6 * (max(times) - min(times)):,.1f}",
                f"{r['algbw'] / 1e9:.3f} GB/s",
                f"{r['busbw'] / 1e9:.3f} GB/s",
                "" if reference is None else f"{reference['seconds'] / r['seconds']:.2f}",
                end_section=i + 1 == len(chosen) or chosen[i + 1]["nbytes"] != r["nbytes"],
            )
        console.print(table)
    for name, reason in absent.items():
        console.print(f"{name} is absent, because: {reason}", highlight=False, soft_wrap=True)


def _reference(record: Record, records: Sequence[Record]) -> Record | None:
    """PyTorch's own, of the same size."""
    found = (r for r in records if r["method"].startswith(REFERENCE) and r["nbytes"] == record["nbytes"])
    return next(found, None)


def draw(records: Sequence[Record], title: str, path: Path) -> None:
    """A row a task: times of small sizes on the left, busbw of large ones on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    tasks = list(dict.fromkeys(r["task"] for r in records))
    parts = {
        "microseconds": lambda r: 1e6 * r["seconds"] if r["nbytes"] <= LATENCY else None,
        "busbw, GB/s": lambda r: r["busbw"] / 1e9 if r["nbytes"] > LATENCY else None,
    }
    parts = {name: value for name, value in parts.items() if any(value(r) is not None for r in records)}
    figure, grid = plt.subplots(
        len(tasks),
        len(parts),
        figsize=(1.6 + 5 * len(parts), 0.8 + 2.6 * len(tasks)),
        squeeze=False,
        layout="constrained",
    )
    for row, task in zip(grid, tasks, strict=True):
        for axes, (label, value) in zip(row, parts.items(), strict=True):
            others = iter(OTHERS)
            for method in dict.fromkeys(r["method"] for r in records if r["task"] == task):
                chosen = [r for r in records if (r["task"], r["method"]) == (task, method)]
                points = [(r["nbytes"], value(r)) for r in chosen if value(r) is not None]
                color = COLORS.get(method) or next(others)
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=color, label=method)
            sizes = sorted({r["nbytes"] for r in records if r["task"] == task and value(r) is not None})
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=7)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:.4g}")
            axes.yaxis.set_minor_formatter("{x:.4g}")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.set_ylabel(label, fontsize=8)
            axes.set_title(task, fontsize=9)
            axes.legend(fontsize=6.5, frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
