"""`python -m bench`: runs the suite, prints the table, writes JSON and charts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from rich.console import Console

from bench import report as reporting
from bench.machine import ROOT, describe

FILES = {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "bench").glob("bench_*.py"))}


class Failures:
    """A pytest plugin that remembers which cases failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def main(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and the charts.")] = ROOT / "results/bench",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(FILES)}.")] = None,
    match: Annotated[
        str | None, typer.Option("--match", "-k", help="Cases whose names match, as pytest's -k does.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small and few: shows that the suite works.")] = False,
    again: Annotated[
        Path | None, typer.Option(help="Report this bench.json or gpu-check.json; measure nothing.")
    ] = None,
) -> None:
    """Times gck's kernels against the memory floor and their peers, in one process."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if again is not None:
        report = json.loads(again.read_text())
        report = report.get("benchmark", report)
        if report.get("schema") != reporting.SCHEMA:
            raise typer.BadParameter(
                f"schema {report.get('schema')} is not {reporting.SCHEMA}; take it anew: {again}",
                param_hint="--again",
            )
    else:
        report = _measure(out, device, only or list(FILES), quick, match)
    reporting.show(report, console)
    for path in reporting.write(report, out):
        console.print(f"wrote {path}")
    raise typer.Exit(1 if report["failed"] else 0)


def _measure(out: Path, device: str, only: list[str], quick: bool, match: str | None) -> reporting.Record:
    unknown = [name for name in only if name not in FILES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(FILES)}", param_hint="--only")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is none of cpu, cuda, auto", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(torch.device(device))
    failures = Failures()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.json"
        arguments = [*(str(FILES[name]) for name in only), f"--rootdir={ROOT}", f"--device={device}"]
        arguments += [
            "-v",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            f"--records={records}",
        ]
        if importlib.util.find_spec("pytest_benchmark"):
            arguments += ["--benchmark-quiet", f"--benchmark-json={out / 'pytest-benchmark.json'}"]
        if quick:
            arguments.append("--quick")
        if match is not None:
            # Where nothing matches, it is said below.
            arguments += ["-k", match, "-W", "ignore:Not saving anything"]
        # Set by a pytest around this one, or to `-n 2`: cases side by side would time each other.
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
            os.environ.pop(name, None)
        code = pytest.main(arguments, plugins=[failures])
        taken = json.loads(records.read_text()) if records.exists() else []
    machine["load_average_after"] = list(os.getloadavg())
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and match is not None:
        raise typer.BadParameter(f"{match!r} is in the name of no case", param_hint="--match")
    if not taken:
        raise typer.Exit(int(code) or 1)
    if code and not failures.names:
        failures.names.append(f"pytest ended with {code!r}")
    return reporting.complete(taken, machine, quick=quick, failed=failures.names)


if __name__ == "__main__":
    typer.run(main)
