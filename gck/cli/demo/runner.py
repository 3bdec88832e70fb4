"""The whole demo: images, links, one crew after another, progress bars, report."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gck.cli.crew import WorkerError, crew
from gck.cli.demo.configurations import CONFIGURATIONS
from gck.cli.demo.model import save_images
from gck.cli.demo.report import (
    Point,
    Report,
    Result,
    network_sentence,
    print_table,
    verdict,
    write_files,
)
from gck.cli.demo.settings import Assignment, Settings
from gck.cli.network import Network, join
from gck.cli.pictures import require_matplotlib
from gck.cli.signals import raising

__all__ = ["run"]

IMAGES = "images.pt"


def run(
    console: Console,
    settings: Settings,
    names: Sequence[str],
    *,
    rate: str,
    use_links: bool,
    out: Path,
    limit: float,
) -> None:
    """Trains every configuration, prints the table and writes the files.

    Raises:
        BackendUnavailableError: the images or matplotlib are not installed.
        WorkerError: a worker failed or took too long; nothing keeps running.
    """
    require_matplotlib()
    with raising(), tempfile.TemporaryDirectory(prefix="gck-demo-") as scratch:
        console.print("Loading 5,000 MNIST digits: 4,000 to train on, 1,000 to test on.")
        save_images(Path(scratch) / IMAGES)
        with join(settings.workers, rate if use_links else None, "--no-links was given") as network:
            console.print(network_sentence(settings.workers, network.rate, network.reason))
            results = _train(console, settings, names, network, Path(scratch), limit)
    report = Report(settings, network.rate, network.reason, results)
    print_table(console, report)
    console.print(verdict(report))
    for path in write_files(report, out):
        console.print(f"wrote {path}", soft_wrap=True)


def _train(
    console: Console, settings: Settings, names: Sequence[str], network: Network, scratch: Path, limit: float
) -> list[Result]:
    """Starts the workers, follows them through all configurations, and sees them off."""
    environment = {"GLOO_SOCKET_IFNAME": network.interface, "OMP_NUM_THREADS": "1"}
    curves: dict[str, list[Point]] = {name: [] for name in names}
    ends: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    current = names[0]
    with _progress(console) as progress:
        tasks = {
            name: progress.add_task(CONFIGURATIONS[name].title, total=settings.steps, start=False, note="")
            for name in names
        }
        progress.update(tasks[current], note="starting the workers")
        try:
            with crew(_commands(settings, names, network, scratch, limit), environment, scratch) as workers:
                for rank, report in workers.events(limit):
                    match report.pop("event"):
                        case "begin":
                            current = report["configuration"]
                            progress.start_task(tasks[current])
                        case "step":
                            progress.update(tasks[current], completed=report["step"])
                        case "test":
                            curves[current].append(Point(**report))
                            progress.update(tasks[current], note=f"test accuracy {report['accuracy']:.1%}")
                        case "done":
                            ends[report["configuration"]][rank] = report
                            progress.stop_task(tasks[report["configuration"]])
        except WorkerError as error:
            raise WorkerError(f"{CONFIGURATIONS[current].title}: {error}") from error
    return [_result(settings, name, network, curves[name], ends[name]) for name in names]


def _commands(
    settings: Settings, names: Sequence[str], network: Network, scratch: Path, limit: float
) -> list[list[str]]:
    commands = []
    for rank in range(settings.workers):
        assignment = Assignment(
            settings=settings,
            configurations=list(names),
            rank=rank,
            parent=os.getpid(),
            data=str(scratch / IMAGES),
            rendezvous=str(scratch),
            interface=network.interface,
            timeout=limit,
        )
        argv = [sys.executable, "-m", "gck.cli.demo.worker", assignment.to_json()]
        commands.append(network.command(rank, argv))
    return commands


def _result(
    settings: Settings, name: str, network: Network, curve: list[Point], ends: dict[int, dict[str, Any]]
) -> Result:
    if len(ends) < settings.workers or not curve:
        raise WorkerError(f"{name}: {len(ends)} of {settings.workers} workers reported their results")
    # On loopback every worker reads the same interface, which carries what all of them send.
    counted = ends.values() if network.nodes else [ends[0]]
    return Result(
        name=name,
        title=CONFIGURATIONS[name].title,
        bytes_per_step=sum(end["sent_bytes"] for end in counted) / settings.workers / settings.steps,
        step_seconds=statistics.median(ends[0]["step_seconds"]),
        training_seconds=sum(ends[0]["step_seconds"]),
        accuracy=curve[-1].accuracy,
        loss=curve[-1].loss,
        curve=curve,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
