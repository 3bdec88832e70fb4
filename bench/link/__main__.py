"""`python -m bench.link`: the time of whole all-reduces over slow links, beside the ideal and PyTorch's.

Every worker is a process behind a link of its own (see `gck.cli.links`); where links cannot be made all of
them share bare loopback, and the tables say so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.link.methods import METHODS
from bench.link.report import draw, goodput, record_of, show
from bench.link.worker import Assignment, to_json
from bench.machine import ROOT, describe
from gck.cli.crew import crew
from gck.cli.links import format_rate
from gck.cli.network import Network, join
from gck.errors import ArgumentError

LOOPBACK = "loopback"
Record = dict[str, Any]
Case = tuple[str, int, int]  # method, numel, repeats


def main(
    workers: Annotated[list[int] | None, typer.Option(help="Processes; may be given again.")] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help='Of every link: "100mbit", ..., or "loopback"; may be given again.'),
    ] = None,
    numel: Annotated[list[int] | None, typer.Option(help="Elements; may be given again.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Part of a method's name; default: all.")] = None,
    burst: Annotated[
        int | None,
        typer.Option(help="Bytes that a link lets through at once; default: of 4 ms, at least 8 KiB."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For the timed repeats of one case.")] = 5,
    limit: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder for link.json and link.png.")] = ROOT / "results/link",
) -> None:
    """Times every method at every size, on every network."""
    titles = [title for title in METHODS if not method or any(part in title for part in method)]
    if not titles:
        raise ArgumentError(f"bench.link: no method is called like {method}; there are {', '.join(METHODS)}")
    console, records = Console(width=150), []
    for rate_name in rate or ["100mbit", "1gbit", LOOPBACK]:
        for count in workers or [4]:
            with join(count, None if rate_name == LOOPBACK else rate_name, burst=burst) as network:
                if network.reason:
                    console.print(f"bare loopback, not {rate_name}: {network.reason}")
                cases = [
                    (title, n, _repeats(title, n, count, network, seconds))
                    for n in numel or [1 << 20, 1 << 22, 25_000_000]
                    for title in titles
                ]
                tcp = network.nodes[0].congestion_control() if network.nodes else None
                found = [{**r, "tcp": tcp} for r in _measure(count, network, cases, limit, console, burst)]
            title = format_rate(network.nodes[0].bits_per_second or 0) if network.nodes else LOOPBACK
            show(found, f"{count} workers, {title}", console)
            records += found
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe(torch.device("cpu")), "records": records}
    (out / "link.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(records, out / "link.png")
    console.print(f"wrote {out}/link.json and link.png", highlight=False)


def _repeats(title: str, numel: int, workers: int, network: Network, seconds: float) -> int:
    """As many as fit into `seconds` by what the bytes alone take, from 3 to 15."""
    if not network.nodes:
        return 15
    ideal = METHODS[title].nbytes(numel, workers) / goodput(network)
    return max(3, min(15, int(seconds / max(ideal, 1e-9))))


def _measure(
    workers: int, network: Network, cases: list[Case], limit: float, console: Console, burst: int | None
) -> Iterator[Record]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="gck-link-") as scratch,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("starting the workers", total=len(cases))
        commands = []
        for rank in range(workers):
            assignment = Assignment(
                rank=rank,
                world_size=workers,
                parent=os.getpid(),
                rendezvous=scratch,
                interface=network.interface,
                shared_interface=not network.nodes,
                bits_per_second=network.nodes[0].bits_per_second if network.nodes else None,
                timeout=limit,
                repeats=cases,
            )
            argv = [sys.executable, "-m", "bench.link.worker", to_json(assignment)]
            commands.append(network.command(rank, argv))
        environment = {"GLOO_SOCKET_IFNAME": network.interface, "PYTHONPATH": str(ROOT)}
        with crew(commands, environment, Path(scratch)) as running:
            latency = 0.0
            for _, event in running.events(limit):
                if event["event"] == "latency":
                    latency = event["seconds"]
                elif event["event"] == "begin":
                    progress.update(task, description=f"{event['method']}, {event['numel']:,}")
                elif event["event"] == "done":
                    progress.advance(task)
                    yield record_of(event, workers, network, latency, burst)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
