"""`python -m bench.convergence`: what each compressor costs a training in loss and in steps.

Ranks are simulated in one process, so that no link and no clock has a part in it: they have a batch each, and
their gradients are reduced as those of real ranks are. With one seed all start from the same weights and read
the same text. Dense trainings with fewer steps say how many a loss is worth.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench.convergence import report
from bench.convergence.cases import BASELINE, CASES, Curve, Settings
from bench.convergence.language import load_text
from bench.convergence.training import Job, begin, train_job
from bench.machine import ROOT, describe

SEEDS = 3
BUDGETS = (0.25, 0.5, 0.7, 0.85)  # of the steps, for dense trainings


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = Settings.steps,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each compressor.")] = SEEDS,
    workers: Annotated[int, typer.Option(min=2, help="Simulated ranks.")] = Settings.workers,
    learning_rate: Annotated[float, typer.Option(help="The highest, of AdamW.")] = Settings.learning_rate,
    only: Annotated[list[str] | None, typer.Option(help="Compressors; dense always runs.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at once, a thread each.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for convergence.json and convergence.png.")] = ROOT
    / "results/convergence",
) -> None:
    """Trains, shows a table, and draws it."""
    if unknown := sorted(set(only or ()) - set(CASES)):
        there_are = ", ".join(CASES)
        raise typer.BadParameter(f"no compressor {unknown[0]!r}; there are: {there_are}", param_hint="--only")
    settings = Settings(workers=workers, steps=steps, learning_rate=learning_rate)
    names = [name for name in CASES if not only or name == BASELINE or name in only]
    jobs = jobs or os.cpu_count() or 1
    console, machine, begun = Console(width=120), describe(torch.device("cpu")), time.monotonic()
    budgets = sorted({max(1, round(part * steps)) for part in (*BUDGETS, 1)})
    plan: list[Job] = [(name, seed, settings) for seed in range(seeds) for name in names]
    fewer = [dataclasses.replace(settings, steps=budget) for budget in budgets if budget < steps]
    plan += [(BASELINE, seed, given) for seed in range(seeds) for given in fewer]
    found: dict[Job, Curve] = {}
    # A pool ends its processes when it is left, also by an error or Ctrl-C.
    with multiprocessing.get_context("spawn").Pool(jobs, begin) as pool:
        under_way = pool.imap_unordered(train_job, plan)
        for job, curve in track(under_way, "trainings", total=len(plan), console=console):
            found[job] = curve
    dense = [
        {
            budget: found[BASELINE, seed, dataclasses.replace(settings, steps=budget)][-1][1]
            for budget in budgets
        }
        for seed in range(seeds)
    ]
    curves = {name: [found[name, seed, settings] for seed in range(seeds)] for name in names}
    records = report.summary(curves, dense, settings)
    console.print(report.table(records, settings))
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "text": {"source": f"the standard library of Python {platform.python_version()}"}
        | load_text().describe(),
        "seconds": round(time.monotonic() - begun),
        "jobs": jobs,
        "seeds": seeds,
        "settings": dataclasses.asdict(settings),
        "dense_losses_by_steps": dense,
        "records": records,
    }
    (out / "convergence.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    report.draw(records, settings, out / "convergence.png")
    console.print(f"wrote {out}/convergence.json and convergence.png", highlight=False)


if __name__ == "__main__":
    typer.run(main)
