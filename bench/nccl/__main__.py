"""`python -m bench.nccl`: sparse all-gather, packed and dense all-reduce over NCCL, by gck, PyTorch and CuPy.

A rank a GPU. With one GPU several ranks share it, and on a machine without one the library that
GCK_NCCL_LIBRARY names may work on host memory, as the tests' does: either shows that all of it runs and is
right, and its times are artefacts, which tables, picture and JSON say. The first and the last result of every
method are compared with the expected bytes; where one is wrong nothing is reported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from bench.machine import ROOT, describe
from bench.nccl.one_device import environment
from bench.nccl.report import draw, record_of, show
from bench.nccl.worker import Assignment
from gck.cli.crew import crew
from gck.collectives.transports.nccl_rendezvous import nccl_library

Record = dict[str, Any]
KB, MB = 1 << 10, 1 << 20
SIZES = [1 * KB, 4 * KB, 16 * KB, 64 * KB, 256 * KB, 1 * MB, 16 * MB, 64 * MB, 256 * MB]
QUICK = [1 * KB, 64 * KB]
ARTEFACTS = [1 * KB, 64 * KB, 1 * MB, 16 * MB]  # where times mean nothing


def main(
    ranks: Annotated[int | None, typer.Option(help="Default: one a GPU, at least 2.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Bytes; may be given again.")] = None,
    seconds: Annotated[float, typer.Option(help="About what a method may take at one size.")] = 0.5,
    quick: Annotated[bool, typer.Option(help="Two small sizes, few calls.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds that one method may take at one size.")] = 120,
    out: Annotated[Path, typer.Option(help="Folder for nccl.json and nccl.png.")] = ROOT / "results/nccl",
) -> None:
    """Times and verifies every method of every task at every size."""
    gpus = torch.cuda.device_count()
    if not gpus and not os.environ.get("GCK_NCCL_LIBRARY"):
        print("bench.nccl: there is no GPU; GCK_NCCL_LIBRARY may name a library for host memory")
        raise typer.Exit(1)
    count = ranks or max(2, gpus)
    device = torch.device("cuda" if gpus else "cpu")
    shared = bool(gpus) and count > gpus
    artefact = f"{count} ranks share {gpus} GPU" if shared else "" if gpus else "host memory, no NCCL"
    sizes = size or (QUICK if quick else ARTEFACTS if artefact else SIZES)
    console = Console(width=150)
    records, absent = run(count, device, shared, sizes, 0.02 if quick else seconds, limit, console)
    machine = describe(device)
    title = f"{count} ranks, {machine['device_name']}, library {nccl_library().version}"
    if artefact:
        title += f"; times are artefacts: {artefact}"
    show(records, title, absent, console)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "schema": 1,
        "machine": machine,
        "library": nccl_library()._asdict(),
        "ranks": count,
        "times_are_artefacts": artefact or None,
        "absent": absent,
        "records": records,
    }
    (out / "nccl.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(records, title, out / "nccl.png")
    console.print(
        f"all results verified; wrote {out}/nccl.json and nccl.png", highlight=False, soft_wrap=True
    )


def run(
    count: int,
    device: torch.device,
    shared: bool,
    sizes: list[int],
    seconds: float,
    limit: float,
    console: Console,
) -> tuple[list[Record], dict[str, str]]:
    """Records, and who is absent and why."""
    records, absent = [], {}
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="gck-nccl-") as scratch,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        shown = progress.add_task("starting the ranks", total=None)
        commands = []
        for rank in range(count):
            assignment = Assignment(
                rank=rank,
                world_size=count,
                parent=os.getpid(),
                rendezvous=scratch,
                device=device.type,
                sizes=sizes,
                seconds=seconds,
                timeout=limit,
            )
            own = [f"{name}={value}" for name, value in environment(rank).items()] if shared else []
            commands.append(["env", *own, sys.executable, "-m", "bench.nccl.worker", assignment.to_json()])
        common = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        with crew(commands, common, Path(scratch)) as running:
            for _, event in running.events(limit):
                if event["event"] == "begin":
                    progress.update(shown, description=event["what"])
                elif event["event"] == "absent":
                    absent = event["absent"]
                elif event["event"] == "done":
                    records.append(record_of(event, count))
    return records, absent


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
