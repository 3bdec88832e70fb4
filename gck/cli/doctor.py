"""`gck doctor`: what works on this machine, what does not, and what to do about it.

Every check is a function that returns findings. One that raises becomes a finding itself, so that the
doctor never fails because of what it looks for.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gck.cli.self_check import COMPRESSORS, NUMEL, differences
from gck.errors import BackendUnavailableError

__all__ = ["Finding", "examine", "main"]

OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    works: bool
    detail: str
    advice: str = ""
    required: bool = False  # for the CPU path


def main(as_json: bool) -> int:
    """Prints the findings; returns 0 if everything that the CPU path needs works, else 1."""
    findings = examine()
    healthy = all(finding.works for finding in findings if finding.required)
    if as_json:
        print(json.dumps({"cpu_path_works": healthy, "findings": [asdict(f) for f in findings]}, indent=2))
        return 0 if healthy else 1
    console = Console()
    table = Table(title="gck doctor", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("works", no_wrap=True)
    table.add_column("found, and what to do about it", overflow="fold")
    for finding in findings:
        mark = (
            "[green]yes[/]" if finding.works else "[bold red]no[/]" if finding.required else "[yellow]no[/]"
        )
        advice = f"\n[yellow]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(finding.name, mark, escape(finding.detail) + advice)
    console.print(table)
    if healthy:
        console.print("The CPU path works. Rows that do not work are optional.")
    else:
        console.print("[bold red]The CPU path does not work:[/] see the rows above.")
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    findings: list[Finding] = []
    for title, required, check in CHECKS:
        try:
            findings.extend(check())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            findings.append(
                Finding(title, False, said, "this check itself failed; please report it", required)
            )
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("gck", True, _version("gck") or "not installed, imported from its source folder")
    yield Finding("Python", True, f"{platform.python_version()} on {platform.platform()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("PyTorch", True, f"{torch.__version__} ({build})")


def _compiled_module() -> Iterator[Finding]:
    from gck._native import load

    try:
        isa = load().isa()
    except BackendUnavailableError as error:
        yield Finding("CPU kernels", False, str(error), "do as it says", required=True)
        return
    detail = f"instruction set {isa}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    advice = ""
    asked = os.environ.get("GCK_ISA") == "portable"
    if isa == "portable" and (asked or platform.machine() in ("x86_64", "AMD64")):
        why = "the environment asks for it (GCK_ISA=portable)" if asked else "this CPU has no AVX2"
        advice = f"{why}: kernels work, but below their best speed"
    yield Finding("CPU kernels", True, detail, advice, required=True)


def _self_checks() -> Iterator[Finding]:
    """The CPU's kernels, and those of every device: compiling them takes a while, the first time."""
    yield _self_check("self-check", torch.device("cpu"), required=True)
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        title, device = f"self-check, CUDA device {index}", torch.device("cuda", index)
        with Console(stderr=True).status(f"compiling kernels for {device}"):
            found = _self_check(title, device, required=False)
        yield found


def _self_check(title: str, device: torch.device, *, required: bool) -> Finding:
    try:
        wrong = differences(device)
    except BackendUnavailableError as error:
        return Finding(title, False, f"not run: {error}", required=required)
    if not wrong:
        names = ", ".join(COMPRESSORS)
        detail = f"same bytes as the references, of {NUMEL:,} elements: {names}"
        return Finding(title, True, detail, required=required)
    detail = "; ".join(f"{name}: {part}" for name, part in wrong.items())
    advice = "do not train with this build; please report it with the output of `gck doctor --json`"
    return Finding(title, False, detail, advice, required)


def _openmp() -> Iterator[Finding]:
    # Whole paths: two copies often have the same file name.
    runtimes = [str(path) for path in _mapped(r"lib(gomp|omp|iomp5)\b")]
    if len(runtimes) == 1:
        yield Finding("OpenMP", True, f"one runtime in the process: {runtimes[0]}")
    elif not runtimes:
        yield Finding(
            "OpenMP", False, "no runtime in the process", "PyTorch without OpenMP runs on one thread"
        )
    else:
        advice = "two thread pools get in each other's way; let one installer provide torch and its OpenMP"
        yield Finding("OpenMP", False, f"several runtimes in the process: {', '.join(runtimes)}", advice)


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        reason = (
            "this PyTorch has no CUDA" if torch.version.cuda is None else "no device or driver is visible"
        )
        yield Finding("CUDA", False, reason, "GPU kernels are off; the CPU path does not need them")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        yield Finding(f"CUDA device {index}", True, f"{facts.name}, sm_{facts.major}{facts.minor}, {memory}")


def _triton() -> Iterator[Finding]:
    try:
        import triton
    except ImportError as error:
        yield Finding("Triton", False, str(error), "GPU kernels need it: `pip install triton`")
        return
    if _release(triton.__version__) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        # Each torch asks for one Triton alone.
        advice = f"GPU kernels need Triton {oldest} or newer, which torch 2.10 is the first to come with"
        yield Finding("Triton", False, f"{triton.__version__}, too old", advice)
        return
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    how = "interpreted, slowly (TRITON_INTERPRET=1)" if interpreted else "compiled"
    if not torch.cuda.is_available() and not interpreted:
        how = "no device to compile for; TRITON_INTERPRET=1 runs kernels on the CPU, slowly"
    yield Finding("Triton", True, f"{triton.__version__}, {how}")


def _nccl() -> Iterator[Finding]:
    """Opens the library as `gck.NcclCommunicator` does: no device or driver is needed for that."""
    from gck.collectives.transports.nccl_rendezvous import nccl_library

    try:
        library = nccl_library()
    except BackendUnavailableError as error:
        yield Finding("NCCL", False, str(error), "only communication between GPUs needs it")
        return
    ways = {
        "GCK_NCCL_LIBRARY": "chosen by GCK_NCCL_LIBRARY",
        "process": "loaded with PyTorch",
        "wheel": "from the nvidia-nccl wheel",
        "system": "from the system",
    }
    yield Finding("NCCL", True, f"{library.version}, {ways[library.origin]}: {library.path}")
    copies = [str(path) for path in _mapped(r"libnccl\.so")]
    if len(copies) > 1:
        advice = "PyTorch and gck use different ones; unset GCK_NCCL_LIBRARY, or install one NCCL"
        yield Finding("NCCL copies", False, f"several in the process: {', '.join(copies)}", advice)


def _cupy() -> Iterator[Finding]:
    if find_spec("cupy") is None:
        yield Finding(
            "CuPy", False, "not installed", "only for CuPy arrays as arguments: `pip install cupy-cuda12x`"
        )
        return
    import cupy

    yield Finding("CuPy", True, cupy.__version__)


def _safetensors() -> Iterator[Finding]:
    yield _library("safetensors", "only to save residuals: `pip install safetensors`")


def _xxhash() -> Iterator[Finding]:
    yield _library("xxhash", "only for checksums of messages: `pip install xxhash`")


def _library(name: str, advice: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name, False, "not installed", advice)
    return Finding(name, True, _version(name) or "of an unknown version")


def _gloo() -> Iterator[Finding]:
    works = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    advice = "" if works else "CPU collectives need a PyTorch that is built with gloo"
    yield Finding("gloo", works, "in PyTorch" if works else "not in this PyTorch", advice)


def _links() -> Iterator[Finding]:
    from gck.cli.links import unavailable_reason

    reason = unavailable_reason()
    advice = "`gck demo` then uses bare loopback; run it as root to see slow links"
    detail = "network namespaces and token buckets can be made" if reason is None else reason
    yield Finding("slow links", reason is None, detail, "" if reason is None else advice)


CHECKS: list[tuple[str, bool, Callable[[], Iterator[Finding]]]] = [
    ("versions", False, _versions),
    ("CPU kernels", True, _compiled_module),
    ("self-check", True, _self_checks),
    ("OpenMP", False, _openmp),
    ("gloo", False, _gloo),
    ("CUDA", False, _cuda),
    ("Triton", False, _triton),
    ("NCCL", False, _nccl),
    ("CuPy", False, _cupy),
    ("safetensors", False, _safetensors),
    ("xxhash", False, _xxhash),
    ("slow links", False, _links),
]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _release(version: str) -> tuple[int, int]:
    """(major, minor), such as of "3.6.0+git1a2b"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _mapped(pattern: str) -> list[Path]:
    """Shared libraries in this process whose file name starts so."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.match(pattern, path.name))
