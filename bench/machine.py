"""Where figures were taken: without it they mean nothing to a reader."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gck
from bench.measure import cache_bytes
from gck._native import load, num_threads

__all__ = ["ROOT", "bind", "describe"]

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor, versions and commit; None for what cannot be found out."""
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "modified": _modified(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cache_bytes": cache_bytes(device),
        "cuda": _cuda(device) if device.type == "cuda" else None,
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "instruction_set": load().isa(),
        "threads": num_threads(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "versions": {
            "gck": gck.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy", "cupy", "pytest-benchmark")},
        },
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
        "runtime": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
    }


def _commit() -> str | None:
    """The commit under test; GCK_COMMIT says it where the sources are a copy without history."""
    return os.environ.get("GCK_COMMIT") or _output("git", "rev-parse", "HEAD")


def _modified() -> bool | None:
    """Whether tracked files differ from the commit."""
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return None if changes is None else changes != ""


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    lines = (_output("lscpu") or "").splitlines()  # knows the names of ARM's numbers, which /proc/cpuinfo has
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("Model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    names = (f"{package}-cuda12x", f"{package}-cuda13x") if package == "cupy" else (package,)
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def bind(rank: int, world_size: int) -> None:
    """Binds this process to processors of its own, or to one that ranks share evenly.

    A scheduler that lets two ranks wait for one processor while another is free is not what is measured.
    """
    processors = sorted(os.sched_getaffinity(0))
    own = max(1, len(processors) // world_size)
    first = rank * own % len(processors)
    os.sched_setaffinity(0, processors[first : first + own])
