"""Worker processes: started, listened to, and never left behind; and what a worker does for its part.

A worker reports on standard output, one JSON object with an "event" a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from gck.cli.signals import postponed, shielded
from gck.errors import GckError

__all__ = ["Crew", "WorkerError", "crew", "end_with", "event_stream", "tell"]

PR_SET_PDEATHSIG = 1

# After the first failure the others get this long to say why they failed: one that dies takes its
# peers along, and which of them is heard first is chance.
LAST_WORDS = 1.0
TAIL_LINES = 6


class WorkerError(GckError, RuntimeError):
    """A worker failed, or took longer than it may."""


class Crew:
    """Running workers, one process each; made by `crew`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
        self.processes = processes
        self.logs = logs

    def events(self, limit: float, lost: Container[int] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
        """(rank, report) in the order of arrival, until all have ended, and well unless in `lost`.

        Raises:
            WorkerError: a worker ended otherwise, or more than `limit` seconds have passed since the start
                or the last report of a "begin".
        """
        deadline = time.monotonic() + limit
        pending: dict[int, bytes] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(_pipe(process), selectors.EVENT_READ, rank)
                pending[rank] = b""
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise WorkerError(f"not finished within {limit:.0f} s; see --limit")
                for key, _ in ready:
                    rank = key.data
                    data = os.read(key.fd, 1 << 16)
                    *lines, pending[rank] = (pending[rank] + data).split(b"\n")
                    for line in lines:
                        report = json.loads(line)
                        if report["event"] == "begin":
                            deadline = time.monotonic() + limit
                        yield rank, report
                    if not data:
                        selector.unregister(key.fileobj)
                        if rank not in lost:
                            self._require_good_end(rank, deadline)

    def _require_good_end(self, rank: int, deadline: float) -> None:
        try:
            status = self.processes[rank].wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise WorkerError(f"worker {rank} said its last word but does not end") from None
        if status:
            time.sleep(LAST_WORDS)
            raise WorkerError(self._failure())

    def _failure(self) -> str:
        statuses = [process.poll() for process in self.processes]
        failed = [rank for rank, status in enumerate(statuses) if status]
        # A worker that was killed is the cause; one that raised may have lost a peer.
        rank = min(failed, key=lambda rank: (statuses[rank] or 0) > 0)
        status = statuses[rank] or 0
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        others = [str(other) for other in failed if other != rank]
        also = f" (then also {', '.join(others)})" if others else ""
        lines = self.logs[rank].read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
        return "\n  ".join([f"worker {rank} {how}{also}", *lines])


@contextmanager
def crew(commands: Sequence[Sequence[str]], environment: dict[str, str], logs: Path) -> Iterator[Crew]:
    """Runs one worker a command; all of them are gone on exit, however it comes about.

    Args:
        commands: one a worker, in rank order.
        environment: what they get besides this process's own.
        logs: folder that gets the standard error of each.
    """
    started = Crew([], [])
    try:
        for rank, command in enumerate(commands):
            log = logs / f"worker{rank}.log"
            with log.open("wb") as errors, postponed():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, **environment},
                    # Ctrl-C in a terminal is for this process, which ends its workers itself.
                    start_new_session=True,
                )
                started.processes.append(process)
                started.logs.append(log)
        yield started
    finally:
        with shielded():
            for process in started.processes:
                if process.poll() is None:
                    process.kill()
            for process in started.processes:
                process.wait()
                _pipe(process).close()


def _pipe(process: subprocess.Popen[bytes]) -> BinaryIO:
    if process.stdout is None:
        raise WorkerError(f"worker process {process.pid} has no pipe to report through")
    return process.stdout  # type: ignore[return-value]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_with(parent: int) -> None:
    """Asks the kernel to kill this process when the one that started it is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this worker is gone")


def event_stream() -> TextIO:
    """Standard output as it was; whatever else is printed from now on goes to standard error."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return events


def tell(events: TextIO, **fields: Any) -> None:
    """Sends one report to whoever runs the crew."""
    print(json.dumps(fields), file=events, flush=True)
