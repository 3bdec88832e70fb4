"""From records to one JSON, a table and charts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.suite import GCK, short

__all__ = ["complete", "draw", "table", "write"]

Record = dict[str, Any]
COLORS = {GCK: "#2a6fdb"}
PEER_COLORS = ("#c9742b", "#8d8d8d", "#6b9a4f")


def complete(records: list[Record], machine: dict[str, Any], *, quick: bool, failed: list[str]) -> Record:
    """The report: records of gck gain how many times faster than each peer they are."""
    by_setting = _by_setting(records)
    for record in records:
        if record["implementation"] == GCK:
            record["times_faster_than"] = {
                peer["implementation"]: peer["seconds"] / record["seconds"]
                for peer in by_setting[_setting(record)]
                if peer is not record
            }
    return {"schema": 1, "quick": quick, "machine": machine, "failed": failed, "records": records}


def write(report: Record, folder: Path) -> list[Path]:
    """bench.json and one bench-<n>.png a size; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return [path, *draw(report, folder)]


def table(report: Record) -> Table:
    """All records. The two floors: err.add_ of the gradient as it is, and of an fp32 copy of it."""
    machine = report["machine"]
    made = Table(
        title=f"{machine['device_name']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}",
        caption="floor: err.add_(grad), timed before each round on buffers of the same pool; fp32 floor: "
        "the same with the gradient in fp32 (12 bytes an element); best: least time over least fp32 floor. "
        "Medians; IQR as a part of the median.",
    )
    made.add_column("kernel")
    for name in ("n", "grad", "setting"):
        made.add_column(name, justify="right")
    made.add_column("implementation")
    for name in ("ms", "IQR", "x floor", "x fp32 floor", "best", "x gck"):
        made.add_column(name, justify="right")
    last = None
    for record in report["records"]:
        group = _setting(record)[:3]
        if last not in (None, group):
            made.add_section()
        last = group
        made.add_row(
            *_row(record, report["records"]), style="bold" if record["implementation"] == GCK else None
        )
    return made


def _row(record: Record, records: list[Record]) -> list[str]:
    name = record["implementation"]
    faster = ""
    if name != GCK:
        ours = [r for r in _by_setting(records)[_setting(record)] if r["implementation"] == GCK]
        faster = f"{ours[0]['times_faster_than'][name]:.1f}" if ours else ""
    return [
        record["kernel"],
        short(record["n"]),
        record["grad_dtype"],
        record["setting"],
        name,
        f"{record['seconds'] * 1e3:.3f}",
        f"{record['iqr_seconds'] / record['seconds']:.0%}",
        f"{record['multiple_of_floor']:.2f}",
        f"{record['multiple_of_fp32_floor']:.2f}",
        f"{record['best_multiple_of_fp32_floor']:.2f}",
        faster,
    ]


def draw(report: Record, folder: Path) -> list[Path]:
    """Bars of multiples of the fp32 floor; a file for each size, a panel for each kernel and dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for n in sorted({record["n"] for record in report["records"]}):
        records = [record for record in report["records"] if record["n"] == n]
        kernels, dtypes = (list(dict.fromkeys(r[key] for r in records)) for key in ("kernel", "grad_dtype"))
        size = (6.2 * len(dtypes), 0.6 + sum(0.9 + 0.24 * _bars(records, kernel) for kernel in kernels))
        figure, grid = plt.subplots(
            len(kernels),
            len(dtypes),
            figsize=size,
            squeeze=False,
            sharex=True,
            height_ratios=[_bars(records, kernel) + 3 for kernel in kernels],
            layout="constrained",
        )
        for axes_row, kernel in zip(grid, kernels, strict=True):
            for axes, dtype in zip(axes_row, dtypes, strict=True):
                chosen = [r for r in records if r["kernel"] == kernel and r["grad_dtype"] == dtype]
                _panel(axes, chosen, f"{kernel}, {dtype} gradient")
        for axes in grid[-1]:
            axes.set_xlabel("multiple of err.add_(grad) with grad in fp32")
        machine = report["machine"]
        figure.suptitle(
            f"{short(n)} elements, {machine['device_name']}, {machine['threads']} CPU threads, "
            f"torch {machine['versions']['torch']}",
            fontsize=10,
        )
        paths.append(folder / f"bench-{short(n)}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def _panel(axes: Any, records: list[Record], title: str) -> None:
    names = list(dict.fromkeys(r["implementation"] for r in records))
    colors = {**dict(zip((n for n in names if n != GCK), PEER_COLORS, strict=False)), **COLORS}
    for place, record in enumerate(records):
        value = record["multiple_of_fp32_floor"]
        # Bars begin at the floor: on a logarithmic axis there is no zero to begin at.
        axes.barh(place, value - 1, left=1, height=0.75, color=colors[record["implementation"]])
        axes.annotate(
            f"{value:.3g}",
            (value, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_yticks(
        range(len(records)), [f"{r['implementation']}, {r['setting']}" for r in records], fontsize=7.5
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(records: list[Record], kernel: str) -> int:
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if record["kernel"] == kernel:
            counts[record["grad_dtype"]] += 1
    return max(counts.values())


def _setting(record: Record) -> tuple[Any, ...]:
    return record["kernel"], record["n"], record["grad_dtype"], record["setting"]


def _by_setting(records: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_setting(record)].append(record)
    return groups


def show(report: Record, console: Console) -> None:
    console.print(table(report))
    machine = report["machine"]
    load = max(machine["load_average"][0], machine["load_average_after"][0])
    # The suite itself keeps `threads` processors busy; more says that others were computing as well.
    if load > machine["threads"] + 0.5:
        console.print(f"[yellow]load average {load:.1f}: others were computing, figures are noisy[/]")
    for name in report["failed"]:
        console.print(f"[red]failed: {name}[/]")
