"""Real ranks: one Python process each, joined by gloo on the loopback interface."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

NETNS_DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000
_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(["torch.nn.parallel", "torch.distributed", "gck.collectives", "gck._native"])


def run_ranks(
    module: str,
    world_size: int,
    directory: Path,
    *args: str,
    timeout: float = 90,
    lost: tuple[int, ...] = (),
    namespaces: Sequence[str] | None = None,
) -> list[Any]:
    """Runs ``python -m module directory *args`` on every rank; what each reported, in rank order.

    Ranks in `lost` are expected to die or hang: they are killed once the others have ended, and report
    None. Nothing is left running, whatever happens. With `namespaces`, see `gck.cli.links`, rank r lives in
    the r-th network namespace.
    """
    interface = "lo" if namespaces is None else "eth0"
    environment = os.environ | {"WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": interface}
    ranks = []
    for rank in range(world_size):
        argv = [module, str(directory), *args]
        log, namespace = directory / f"{rank}.log", namespaces[rank] if namespaces else None
        ranks.append(start(argv, environment | {"RANK": str(rank)}, log, namespace))
    deadline = time.monotonic() + timeout
    failed = []
    try:
        for rank, process in enumerate(ranks):
            if rank in lost:
                continue
            process.join(max(0.1, deadline - time.monotonic()))
            code = process.exitcode
            if code != 0:
                how = f"still running after {timeout} s" if code is None else str(code)
                text = (directory / f"{rank}.log").read_text()[-3000:]
                failed.append(f"rank {rank} ({how}):\n{text}")
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert not failed, "\n".join(failed)
    reports = [directory / f"{rank}.json" for rank in range(world_size)]
    return [None if rank in lost else json.loads(report.read_text()) for rank, report in enumerate(reports)]


def start(
    argv: list[str], environment: dict[str, str], log: Path, namespace: str | None = None
) -> BaseProcess:
    """``python -m argv[0] argv[1:]`` in a process of its own, forked where torch is imported already."""
    process = _servers.Process(target=_main, args=(argv, environment, log, namespace), daemon=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when libraries are loaded, in the server
    try:
        process.start()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return process


def _main(argv: list[str], environment: dict[str, str], log: Path, namespace: str | None) -> None:
    if namespace is not None:
        with (NETNS_DIRECTORY / namespace).open() as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = argv.copy()
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def init(timeout: float = 30, backend: str | None = "gloo") -> tuple[Path, int, int]:
    """In a rank: joins the others; returns (directory, rank, world size). Without a backend torch chooses."""
    import torch.distributed as dist

    directory = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    return directory, rank, world_size


def report(directory: Path, rank: int, result: Any) -> None:
    """In a rank: what `run_ranks` returns for it."""
    (directory / f"{rank}.json").write_text(json.dumps(result))


def run_checks(checks: Mapping[str, Callable[[], None]]) -> dict[str, str]:
    """In a rank: "passed", or what went wrong; no more after one that failed: ranks may be out of step."""
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break
    return results


def assert_passed(check: str, reports: Sequence[Mapping[str, str]]) -> None:
    """That `run_checks` says so, on every rank."""
    for rank, report in enumerate(reports):
        assert check in report, f"rank {rank} stopped before {check}"
        assert report[check] == "passed", f"rank {rank}: {report[check]}"


def leave() -> None:
    """In a rank: ends at once; the usual way out waits for operations that a lost peer left behind, and
    `destroy_process_group` may hang even without one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
