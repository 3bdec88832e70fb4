"""What the demo shows at its end: a table, a sentence, a picture and a JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gck.cli.demo.configurations import BASELINE
from gck.cli.demo.settings import Settings
from gck.cli.links import format_rate, parse_rate
from gck.cli.pictures import canvas

__all__ = [
    "Point",
    "Report",
    "Result",
    "network_sentence",
    "print_table",
    "verdict",
    "write_files",
]

# Okabe and Ito's palette: told apart with colour-blind eyes too; the markers help on paper.
STYLES = [("#000000", "o"), ("#0072B2", "s"), ("#E69F00", "^"), ("#D55E00", "D"), ("#009E73", "v")]


@dataclass(frozen=True)
class Point:
    """One look at the test images."""

    step: int
    seconds: float  # of training so far
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Result:
    """What one configuration did."""

    name: str
    title: str
    bytes_per_step: float  # that a worker put on its link, mean over steps and workers
    step_seconds: float  # median of rank 0
    training_seconds: float
    accuracy: float
    loss: float
    curve: list[Point]


@dataclass(frozen=True)
class Report:
    """A finished demo."""

    settings: Settings
    rate: str | None  # None: bare loopback
    reason: str | None  # why bare loopback
    results: list[Result]

    @property
    def baseline(self) -> Result | None:
        return next((result for result in self.results if result.name == BASELINE), None)

    def speedup(self, result: Result) -> float | None:
        return self.baseline.step_seconds / result.step_seconds if self.baseline else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": {
                "kind": "namespaces" if self.rate else "loopback",
                "rate": self.rate,
                "reason": self.reason,
            },
            "settings": asdict(self.settings),
            "machine": {
                "cpus": os.cpu_count(),
                "load_average": os.getloadavg(),
                "system": platform.platform(),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "results": [{**asdict(result), "speedup": self.speedup(result)} for result in self.results],
        }


def network_sentence(workers: int, rate: str | None, reason: str | None) -> str:
    """Where the workers run."""
    if rate is not None:
        return f"{workers} workers, each in a network namespace of its own behind a {_rate(rate)} link."
    return f"{workers} workers on bare loopback, not slowed down: {reason}."


def print_table(console: Console, report: Report) -> None:
    settings = report.settings
    total = settings.workers * settings.batch
    table = Table(
        title=f"{settings.steps} steps of {total} images, {settings.workers} workers, " + _rate(report.rate),
        caption=_caption(report),
        caption_justify="left",
    )
    table.add_column("configuration", no_wrap=True)
    for heading in ("sent\na step", "median\nstep", "speed-\nup", "test\naccuracy", "test\nloss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in report.results:
        speedup = report.speedup(result)
        table.add_row(
            result.title,
            _bytes(result.bytes_per_step),
            f"{result.step_seconds * 1e3:.0f} ms",
            "" if speedup is None else f"{speedup:.1f}x",
            f"{result.accuracy:.1%}",
            f"{result.loss:.3f}",
        )
    console.print(table)


def verdict(report: Report) -> str:
    """What the table says, in two sentences."""
    baseline = report.baseline
    if baseline is None or len(report.results) < 2:
        return "Without the dense configuration and another one there is nothing to compare."
    fastest = min(report.results, key=lambda result: result.step_seconds)
    parts = []
    for result in report.results:
        if result.name.startswith("gck-"):
            points = (result.accuracy - baseline.accuracy) * 100
            parts.append(
                f"{result.title}: {report.speedup(result):.1f}x the speed of dense, "
                f"{result.bytes_per_step / baseline.bytes_per_step:.1%} of its bytes, "
                f"{points:+.1f} points of accuracy."
            )
    parts.append(f"Fastest step here: {fastest.title}.")
    if report.rate is None:
        parts.append(
            "Bare loopback is not a slow network: where bytes cost nothing, sending fewer gains nothing."
        )
    parts.append(
        "One seed and a small model: a demonstration of what a slow link costs, not a ranking of compressors."
    )
    return "\n".join(parts)


def write_files(report: Report, out: Path) -> Sequence[Path]:
    """Writes demo.json and demo.png into the folder `out`, and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, picture = out / "demo.json", out / "demo.png"
    numbers.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    _draw(report, picture)
    return numbers, picture


def _draw(report: Report, path: Path) -> None:
    figure, axes = canvas(8, 4.8)
    for result, (colour, marker) in zip(report.results, STYLES, strict=False):
        axes.plot(
            [point.seconds for point in result.curve],
            [point.accuracy * 100 for point in result.curve],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=f"{result.title}: {result.accuracy:.1%} after {result.training_seconds:.1f} s",
        )
    axes.set_title(
        f"{report.settings.workers} workers, {_rate(report.rate)}, {report.settings.steps} steps each"
    )
    axes.set_xlabel("training time, seconds")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path)


def _caption(report: Report) -> str:
    if report.rate is None:
        caption = "Sent: traffic of the whole loopback interface, divided by the workers"
    else:
        caption = "Sent: by each worker, from its interface's counter, most headers left out"
    caption += "; mean over all steps"
    if any(result.name == "powersgd" for result in report.results):
        caption += f", of which PowerSGD's first {report.settings.powersgd_start} are dense"
    return f"{caption}."


def _rate(rate: str | None) -> str:
    return "bare loopback" if rate is None else format_rate(parse_rate(rate))


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
