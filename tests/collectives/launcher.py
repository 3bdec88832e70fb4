"""Real ranks: one Python process each, joined by gloo on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(
    module: str,
    world_size: int,
    directory: Path,
    *args: str,
    timeout: float = 90,
    lost: tuple[int, ...] = (),
) -> list[Any]:
    """Runs ``python -m module directory *args`` on every rank; what each reported, in rank order.

    Ranks in `lost` are expected to die or hang: they are killed once the others have ended, and report
    None. Nothing is left running, whatever happens.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    ranks = []
    for rank in range(world_size):
        with (directory / f"{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(directory), *args],
                    env=environment | {"RANK": str(rank)},
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + timeout
    failed = []
    try:
        for rank, process in enumerate(ranks):
            if rank in lost:
                continue
            try:
                code: int | str = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = f"still running after {timeout} s"
            if code != 0:
                text = (directory / f"{rank}.log").read_text()[-3000:]
                failed.append(f"rank {rank} ({code}):\n{text}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not failed, "\n".join(failed)
    reports = [directory / f"{rank}.json" for rank in range(world_size)]
    return [None if rank in lost else json.loads(report.read_text()) for rank, report in enumerate(reports)]


def init(timeout: float = 30) -> tuple[Path, int, int]:
    """In a rank: joins the others; returns (directory, rank, world size)."""
    import torch.distributed as dist

    directory = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    return directory, rank, world_size


def report(directory: Path, rank: int, result: Any) -> None:
    """In a rank: what `run_ranks` returns for it."""
    (directory / f"{rank}.json").write_text(json.dumps(result))


def leave() -> None:
    """In a rank: ends at once; the usual way out waits for operations that a lost peer left behind, and
    `destroy_process_group` may hang even without one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
