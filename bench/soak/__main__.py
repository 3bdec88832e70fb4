"""`python -m bench.soak`: all-reduces of random sizes, dtypes and compressors, with faults, by processes.

Every result, and every rank's residuals, are compared with those of simulated ranks; faults that change
bytes or configurations must end in the same typed error on all ranks, and change nothing. At the end ranks
are stopped for longer than their peers wait, after which all go on in a new group; and ranks are killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.machine import ROOT, describe
from bench.soak.plan import FAULTS
from bench.soak.verdict import Verdict
from bench.soak.worker import Assignment, to_json
from gck.cli.crew import crew

Report = dict[str, Any]
AFTER_KILL = 25  # operations of a crew, at most, before one of its ranks is killed
LOOK_EVERY = 100  # operations between two looks at memory
FREEZE_EVERY = 20  # operations, of a crew whose ranks are stopped for long


def main(
    operations: Annotated[int, typer.Option(help="All-reduces without kills.")] = 10_000,
    kills: Annotated[int, typer.Option(help="Ranks to kill afterwards, each in a crew of its own.")] = 10,
    freezes: Annotated[int, typer.Option(help="Ranks to stop for longer than their peers wait.")] = 10,
    workers: Annotated[int, typer.Option(help="Processes.")] = 4,
    rate: Annotated[float, typer.Option(help="Share of operations with a fault.")] = 0.05,
    seed: Annotated[int, typer.Option()] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that a wait may take.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for soak.json.")] = ROOT / "results/soak",
) -> None:
    """Exits with status 1 if anything went wrong unnoticed."""
    console, verdict, began = Console(width=120), Verdict(), time.monotonic()
    until = operations + freezes * FREEZE_EVERY
    total = until + kills * AFTER_KILL
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="gck-soak-") as scratch,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("all-reduces", total=total)

        def run(
            first: int, last: int, freeze: int = 0, look: int = 0, kill: tuple[int, int] | None = None
        ) -> None:
            fixed = (workers, os.getpid(), scratch, seed, total, rate, first, last, timeout, freeze, look)
            given = [Assignment(rank, *fixed) for rank in range(workers)]
            _run(given, verdict, Path(scratch), (bar, task), kill)

        run(0, operations, look=LOOK_EVERY)
        if freezes:
            run(operations, until, FREEZE_EVERY, FREEZE_EVERY)
        rng = random.Random(seed)
        for first in range(until, total, AFTER_KILL):
            kill = rng.randrange(workers), first + rng.randrange(AFTER_KILL - 5)
            run(first, first + AFTER_KILL, kill=kill)
    _show(verdict, console, time.monotonic() - began)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": describe(torch.device("cpu")),
        "workers": workers,
        "seed": seed,
        **vars(verdict),
    }
    (out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {out}/soak.json", highlight=False)
    if verdict.wrong:
        raise typer.Exit(1)


def _run(
    given: list[Assignment],
    verdict: Verdict,
    scratch: Path,
    progress: tuple[Progress, TaskID],
    kill: tuple[int, int] | None,
) -> None:
    """One crew; with `kill`, (rank, operation), that rank is killed once it has reported that operation."""
    planned = {operation.index: operation for operation in given[0].planned()}
    reports: dict[int, dict[int, Report]] = defaultdict(dict)
    commands = [[sys.executable, "-m", "bench.soak.worker", to_json(a)] for a in given]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lost = () if kill is None else range(len(given))
    with crew(commands, environment, scratch) as running:
        for rank, report in running.events(1200 + given[0].timeout, lost):
            if report["event"] == "stopping":
                wake = running.processes[rank].pid, report["seconds"]
                threading.Thread(target=_wake, args=wake, daemon=True).start()
                continue
            index = report.pop("index")
            reports[index][rank] = report
            verdict.look(rank, report, rebuilds=given[0].freeze_every > 0)
            if kill == (rank, index):
                with suppress(ProcessLookupError):
                    running.processes[rank].kill()
            if len(reports[index]) == len(given):
                verdict.add(planned[index], reports.pop(index))
                progress[0].advance(progress[1])
    if kill is not None:
        # Of the operation that could not end, survivors alone have reported.
        failed = {rank: r for by_rank in reports.values() for rank, r in by_rank.items() if r["error"]}
        verdict.add_killed(planned[kill[1]], kill[0], failed, len(given))


def _wake(pid: int, seconds: float) -> None:
    """Lets a process that is about to stop itself go on, `seconds` after it has."""
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


def _show(verdict: Verdict, console: Console, seconds: float) -> None:
    table = Table(title=f"{verdict.operations:,} all-reduces in {seconds:.0f} s")
    for column in ("fault", "injected", "ended as it must, on all ranks"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind in FAULTS:
        table.add_row(kind, str(verdict.injected[kind]), str(verdict.detected[kind]))
    survivors = ", ".join(f"{count} {name}" for name, count in sorted(verdict.survivors.items()))
    frozen = ", ".join(f"{count} {name}" for name, count in sorted(verdict.frozen.items()))
    table.add_row("rank frozen", str(verdict.freezes), f"{frozen} within {verdict.slowest_frozen:.1f} s")
    table.add_row("rank killed", str(verdict.kills), f"{survivors} within {verdict.slowest:.1f} s")
    console.print(table)
    console.print(f"wrong results or undetected faults: {len(verdict.wrong)}")
    for text in verdict.wrong[:10]:
        console.print(f"  {text}", highlight=False)
    for rank in sorted(verdict.memory):
        memory, descriptors = verdict.memory[rank], verdict.descriptors[rank]
        grown = f"{verdict.growth(memory) / 1e6:+.1f} MB, {verdict.growth(descriptors):+d} descriptors"
        console.print(
            f"rank {rank}: {memory[-1] / 1e6:.0f} MB, {descriptors[-1]} descriptors; since a quarter: {grown}"
        )
    for rank, descriptors in sorted(verdict.rebuilt.items()):
        console.print(
            f"rank {rank}, whose group was made anew {verdict.freezes} times: {descriptors} descriptors"
        )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
