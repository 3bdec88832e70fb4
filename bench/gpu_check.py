"""`make gpu-check`: on a machine with a GPU and perhaps no package index, builds the compiled module with
plain cmake, runs the GPU tests and the benchmark, and writes everything learned to one JSON.

Exit status: 0 all is well, 1 the build, a test or the benchmark failed, 2 there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
FAILED, NO_GPU = 1, 2
MOST_WORKERS = 12  # each holds its own memory on the GPU
CONSOLE = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(envvar="OUT", help="Folder for gpu-check.json.")] = ROOT
    / "results/gpu-check",
    quick: Annotated[bool, typer.Option(help="Benchmark small and few.")] = False,
    build_only: Annotated[bool, typer.Option(help="Build, and stop; needs no GPU.")] = False,
) -> None:
    """Builds gck in the source tree, runs `pytest -m gpu` and the benchmark on the GPU."""
    if not build_only and not torch.cuda.is_available():
        CONSOLE.print(
            f"gpu-check: no GPU: torch {torch.__version__} sees no CUDA device. Nothing was built or run.",
            style="bold red",
            soft_wrap=True,
        )
        raise typer.Exit(NO_GPU)
    if not build_only:
        preflight()
    build()
    if build_only:
        return
    from bench.machine import describe  # loads the module that was just built

    report: dict[str, Any] = {"schema": 1, "machine": describe(torch.device("cuda"))}
    with tempfile.TemporaryDirectory() as folder:
        report["tests"] = run_tests(Path(folder))
        report["benchmark"] = run_benchmark(Path(folder), quick)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu-check.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    tests, benchmark = report["tests"], report["benchmark"]
    well = tests["exit_status"] == 0 and tests["passed"] > 0 and benchmark["exit_status"] == 0
    CONSOLE.rule("gpu-check")
    counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped"))
    CONSOLE.print(f"tests: {counts}; benchmark: {len(benchmark['records'])} cases; wrote {path}")
    raise typer.Exit(0 if well else FAILED)


def preflight() -> None:
    """Names what the tests need and this Python lacks, before minutes are spent on building."""
    needed = (
        "triton",
        "numpy",
        "pytest",
        "pytest_timeout",
        "hypothesis",
        "rich",
        "typer",
        "pybind11",
        "matplotlib",
    )
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        CONSOLE.print(f"gpu-check: this Python lacks {', '.join(missing)}", style="bold red")
        raise typer.Exit(FAILED)


def build() -> None:
    """Compiles gck/_C into the source tree. pybind11 and cmake must be there; nothing is downloaded."""
    folder = ROOT / "build/gpu-check"
    configure: list[str | Path] = ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    steps: tuple[list[str | Path], ...] = (
        [*configure, "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)],
        ["cmake", "--install", folder, "--prefix", ROOT],
    )
    for step in steps:
        if run("build", *step) != 0:
            CONSOLE.print("gpu-check: the build failed; the reason is above", style="bold red")
            raise typer.Exit(FAILED)


def run_tests(folder: Path) -> dict[str, Any]:
    """Runs the tests marked `gpu`; no GPU test at all counts as a failure (pytest's status 5)."""
    results = folder / "tests.xml"
    workers = min(MOST_WORKERS, 3 * (os.cpu_count() or 1) // 4)
    # References and compilers keep processors busy far longer than kernels keep the GPU.
    beside = ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 and find_spec("xdist") else []
    # Its plugin warns beside xdist, and a warning is an error.
    beside += ["-p", "no:benchmark"] if find_spec("pytest_benchmark") else []
    status = run(
        "GPU tests", sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-p", "no:cacheprovider",
        "--durations=5", f"--junitxml={results}", *beside,
        # Workers whose references take a thread a processor each keep one another from working.
        environment={"OMP_NUM_THREADS": "1"} if "-n" in beside else {},
    )  # fmt: skip
    return {"exit_status": status, **counts(results)}


def counts(results: Path) -> dict[str, Any]:
    """Numbers of tests and names of those that failed, from pytest's JUnit file."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    names: list[str] = []
    if results.exists():
        for suite in ET.parse(results).iter("testsuite"):
            for key in total:
                total[key] += int(suite.get(key, 0))
            names += [
                f"{case.get('classname')}::{case.get('name')}"
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
    failed = total["failures"] + total["errors"]
    passed = max(0, total["tests"] - failed - total["skipped"])
    return {"passed": passed, "failed": failed, "skipped": total["skipped"], "failed_tests": names}


def run_benchmark(folder: Path, quick: bool) -> dict[str, Any]:
    options = ["--quick"] if quick else []
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--out", str(folder), *options]
    status = run("benchmark", *command)
    path = folder / "bench.json"
    report = json.loads(path.read_text()) if path.exists() else {"records": [], "failed": []}
    return {"exit_status": status, **report}


def run(title: str, *command: str | Path, environment: dict[str, str] | None = None) -> int:
    """Runs a command in the repository with its output shown; returns its exit status."""
    words = [str(word) for word in command]
    CONSOLE.rule(title)
    CONSOLE.print("$ " + " ".join(words), style="dim", soft_wrap=True, highlight=False)
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), known.get("PYTHONPATH", "")]
    known["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
        return subprocess.run(words, cwd=ROOT, env=known | (environment or {}), check=False).returncode
    except FileNotFoundError:
        CONSOLE.print(f"gpu-check: {words[0]} was not found", style="bold red")
        return 127


if __name__ == "__main__":
    typer.run(main)
