"""From records to one JSON, tables and charts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.charts import draw
from bench.inputs import GAUSSIAN
from bench.suite import GCK, short

__all__ = ["SCHEMA", "complete", "show", "tables", "topics", "write"]

Record = dict[str, Any]
SCHEMA = 2
LEGEND = (
    "Medians; IQR as a part of the median. floor: err.add_(grad), timed before each round on buffers of the "
    "same pool; fp32 floor: the same with the gradient in fp32, 12 bytes an element; best: least time over "
    "least fp32 floor; own floor: the bytes that this function must move, at the bandwidth of the fp32 floor."
)


def complete(records: list[Record], machine: dict[str, Any], *, quick: bool, failed: list[str]) -> Record:
    """The report: records of gck gain how many times faster than each peer they are, and records of other
    inputs how many times the common input's time they take."""
    by_setting = _by_setting(records)
    for record in records:
        if record["implementation"] == GCK:
            record["times_faster_than"] = {
                peer["implementation"]: peer["seconds"] / record["seconds"]
                for peer in by_setting[_setting(record)]
                if peer is not record
            }
        if record["option"] == "input":
            common = by_setting[(*_setting(record)[:-1], GAUSSIAN)]
            if common:
                record["times_common_input"] = record["seconds"] / common[0]["seconds"]
    return {"schema": SCHEMA, "quick": quick, "machine": machine, "failed": failed, "records": records}


def write(report: Record, folder: Path) -> list[Path]:
    """bench.json, and a chart a topic and size; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return [path, *draw(report, folder)]


def topics(report: Record) -> dict[str, list[Record]]:
    """The records of each file of the suite."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in report["records"]:
        found[record["topic"]].append(record)
    return found


def tables(report: Record) -> list[Table]:
    """One a topic. The two floors: err.add_ of the gradient as it is, and of an fp32 copy of it."""
    return [_table(topic, records) for topic, records in topics(report).items()]


def _table(topic: str, records: list[Record]) -> Table:
    """What is the same in all rows stands in the title."""
    by_setting = _by_setting(records)
    rows = [_cells(record, by_setting) for record in records]
    described = ("kernel", "n", "grad", "implementation")
    same = [name for name in described if len({row[name] for row in rows}) == 1]
    names = [name for name in rows[0] if name not in same and any(row[name] for row in rows)]
    made = Table(title=", ".join([topic, *(f"{name} {rows[0][name]}" for name in same)]))
    for name in names:
        made.add_column(name, justify="left" if name in ("kernel", "implementation") else "right")
    last = None
    for record, row in zip(records, rows, strict=True):
        group = _setting(record)[1:-1]
        if last not in (None, group):
            made.add_section()
        last = group
        ours = record["implementation"] == GCK and "implementation" in names
        made.add_row(*(row[name] for name in names), style="bold" if ours else None)
    return made


def _cells(record: Record, by_setting: dict[tuple[Any, ...], list[Record]]) -> dict[str, str]:
    name, own = record["implementation"], record.get("multiple_of_own_floor")
    common = record.get("times_common_input")
    ours = [r for r in by_setting[_setting(record)] if r["implementation"] == GCK and name != GCK]
    return {
        "kernel": record["kernel"],
        "n": short(record["n"]),
        "grad": record["grad_dtype"],
        record["option"]: record["setting"],
        "implementation": name,
        "time": duration(record["seconds"]),
        "IQR": f"{record['iqr_seconds'] / record['seconds']:.0%}",
        "x floor": f"{record['multiple_of_floor']:.2f}",
        "x fp32 floor": f"{record['multiple_of_fp32_floor']:.2f}",
        "best": f"{record['best_multiple_of_fp32_floor']:.2f}",
        "x own floor": "" if own is None else f"{own:.2f}",
        f"x {GAUSSIAN}": "" if common is None else f"{common:.2f}",
        "x gck": f"{ours[0]['times_faster_than'][name]:.2f}" if ours else "",
    }


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    value, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _setting(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("topic", "kernel", "n", "grad_dtype", "setting"))


def _by_setting(records: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_setting(record)].append(record)
    return groups


def show(report: Record, console: Console) -> None:
    machine = report["machine"]
    console.print(
        f"{machine['device_name']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}",
        highlight=False,
    )
    for table in tables(report):
        console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    load = max(machine["load_average"][0], machine["load_average_after"][0])
    # The suite itself keeps `threads` processors busy; more says that others were computing as well.
    if load > machine["threads"] + 0.5:
        console.print(f"[yellow]load average {load:.1f}: others were computing, figures are noisy[/]")
    for name in report["failed"]:
        console.print(f"[red]failed: {name}[/]")
