"""`make count-arm64`: instructions an element, of NEON's kernels and of the portable ones, under QEMU.

Counts say what a change does to the code of a machine that is not there. They are no times: how many
instructions a cycle takes, and what memory does, only an ARM machine tells; `make bench` there measures it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.arm64.calls import NUMEL
from bench.machine import ROOT, describe

HERE = Path(__file__).parent
SETS = ("neon", "portable")


def main(
    machine: Annotated[Path, typer.Option(help="What `make test-arm64` has set up.")] = ROOT / ".arm64",
    out: Annotated[Path, typer.Option(help="Folder for arm64-instructions.json.")] = ROOT / "results",
) -> None:
    """Counts, shows a table and writes it down."""
    console = Console(width=100)
    plugin = ROOT / "build" / "arm64" / "counter.so"
    flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(HERE / "counter.c"), "-o", str(plugin)], check=True)
    counts = {}
    for instruction_set in SETS:
        with console.status(f"counting {instruction_set}"):
            counts[instruction_set] = count(machine, plugin, instruction_set)
    table = Table("call", *SETS, title="instructions an element, one thread")
    for name in counts[SETS[0]]:
        table.add_row(name, *(f"{counts[each][name]:.2f}" for each in SETS))
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    machine_of_run = describe(torch.device("cpu"))
    where = {key: machine_of_run[key] for key in ("taken", "commit", "modified")}
    qemu = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True)
    report = {**where, "qemu": qemu.stdout.splitlines()[0], "numel": NUMEL, "instructions_an_element": counts}
    (out / "arm64-instructions.json").write_text(json.dumps(report, indent=1) + "\n")


def count(machine: Path, plugin: Path, instruction_set: str) -> dict[str, float]:
    """Instructions an element of each call, by its name."""
    root, path = machine / "root", f"{machine / 'site'}:{ROOT}"
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "GCK_ISA": instruction_set}
    run = ["qemu-aarch64", "-plugin", str(plugin), "-L", str(root), str(root / "usr/bin/python3.11")]
    done = subprocess.run(
        [*run, "-m", "bench.arm64.calls"],
        cwd=ROOT,
        env=os.environ | environment | {"QEMU_LD_PREFIX": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return by_name(json.loads(done.stdout.splitlines()[-1]), done.stderr)


def by_name(names: list[str], printed: str) -> dict[str, float]:
    """From what the plugin has printed before and after each call."""
    counted: dict[int, Any] = {int(i): int(n) for i, n in re.findall(r"^counted (\d+) (\d+)$", printed, re.M)}
    return {name: (counted[2 * i + 1] - counted[2 * i]) / NUMEL for i, name in enumerate(names)}


if __name__ == "__main__":
    typer.run(main)
