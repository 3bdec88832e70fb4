"""`gck plan`: checks its options, measures, and prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gck.cli.messages import stop
from gck.cli.pictures import require_matplotlib
from gck.cli.plan.compressors import CANDIDATES
from gck.cli.plan.estimate import make_plan
from gck.cli.plan.report import advice, print_table, to_dict, write_files
from gck.cli.plan.settings import Settings
from gck.errors import ArgumentError, BackendUnavailableError, GckError

__all__ = ["main"]


def main(
    *,
    numel: str,
    world_size: int,
    rate: str,
    latency_ms: float,
    backward_ms: float | None,
    device: str,
    compressors: Sequence[str],
    out: Path | None,
    as_json: bool,
) -> int:
    """Returns the exit status: 0, 1 after a failure, 2 for wrong options."""
    errors = Console(stderr=True)
    try:
        settings = Settings.parse(numel, world_size, rate, latency_ms, backward_ms, device)
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError("--device cuda: PyTorch sees no CUDA device")
        if out is not None:
            require_matplotlib()
            out.mkdir(parents=True, exist_ok=True)
        names = [*CANDIDATES, *compressors]
        columns = (TextColumn("measuring {task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("compressors", total=len(names))
            plan = make_plan(settings, names, lambda: progress.advance(task))
        written = () if out is None else write_files(plan, out)
    except ArgumentError as error:
        return stop("gck plan", str(error), 2)
    except GckError as error:
        return stop("gck plan", str(error), 1)
    except OSError as error:
        return stop("gck plan", f"--out: {error}", 1)
    if as_json:
        print(json.dumps(to_dict(plan), indent=2))
    else:
        console = Console()
        console = Console(width=max(80, console.width))
        print_table(console, plan)
        console.print(advice(plan), highlight=False, markup=False)
    for path in written:
        errors.print(f"wrote {path}", highlight=False, markup=False)
    return 0
