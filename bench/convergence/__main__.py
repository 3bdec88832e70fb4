"""`python -m bench.convergence`: what each compressor costs a training in loss and in steps.

Ranks are simulated in one process, so that no link and no clock has a part in it: they have a batch each, and
their gradients are reduced as those of real ranks are. With one seed all start from the same weights and read
the same text.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench.convergence import report
from bench.convergence.training import BASELINE, CASES, Settings, train
from bench.machine import ROOT, describe

SEEDS = 3


def main(
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = Settings.steps,
    seeds: Annotated[int, typer.Option(help="Trainings with each compressor.")] = SEEDS,
    workers: Annotated[int, typer.Option(help="Simulated ranks.")] = Settings.workers,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after 25 steps.")] = Settings.learning_rate,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of compressors; dense is always there.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at once, a thread each.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for convergence.json and convergence.png.")] = ROOT
    / "results/convergence",
) -> None:
    """Trains, shows a table, and draws it."""
    unknown = sorted(set(only or ()) - set(CASES))
    if unknown:
        raise typer.BadParameter(
            f"no compressor {unknown[0]!r}; there are: {', '.join(CASES)}", param_hint="--only"
        )
    settings = Settings(workers=workers, steps=steps, learning_rate=learning_rate)
    names = [name for name in CASES if not only or name == BASELINE or name in only]
    console, machine, begun = Console(width=120), describe(torch.device("cpu")), time.monotonic()
    plan = [(name, seed) for seed in range(seeds) for name in names]
    found: dict[tuple[str, int], report.Curve] = {}
    with ProcessPoolExecutor(
        jobs or os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        running = {pool.submit(train, name, seed, settings): (name, seed) for name, seed in plan}
        for done in track(as_completed(running), "trainings", total=len(plan), console=console):
            found[running[done]] = done.result()
    records = report.summary({name: [found[name, seed] for seed in range(seeds)] for name in names}, settings)
    console.print(report.table(records, settings))
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "text": f"the standard library of Python {platform.python_version()}",
        "seconds": round(time.monotonic() - begun),
        "settings": dataclasses.asdict(settings),
        "records": records,
    }
    (out / "convergence.json").write_text(json.dumps(content) + "\n")
    report.draw(records, out / "convergence.png")
    console.print(f"wrote {out}/convergence.json and convergence.png", highlight=False)


if __name__ == "__main__":
    typer.run(main)
