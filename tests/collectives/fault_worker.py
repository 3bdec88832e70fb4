"""One rank of test_faults.py. The last rank dies or stalls; the others report what they saw.

usage: fault_worker DIRECTORY kill | stop | midway | pieces [bytes from which all-to-all goes in rounds]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gck.collectives import all_reduce_
from gck.collectives.transports import rotation
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveError, GroupUnusableError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher

TIMEOUT = 2.0


@dataclass(frozen=True)
class Deadly:
    """Sign, but the process dies when it compresses for the n-th time: for the second time as the owner,
    between phases; in pieces, for the fifth time with one message under way."""

    die_at: int
    inner: Sign = field(default_factory=lambda: Sign(32))
    calls: list[int] = field(default_factory=list, repr=False, compare=False)
    name = "deadly"
    shard_unit = 32

    def layout(self, numel: int) -> Any:
        return self.inner.layout(numel)

    def compress_(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(1)
        if len(self.calls) == self.die_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner.compress_(*args, **kwargs)

    def decompress_(self, *args: Any, **kwargs: Any) -> None:
        self.inner.decompress_(*args, **kwargs)

    def at(self, start: int) -> Any:
        return self


def survive(
    compressor: Any, algorithm: str, group: Any, timeout: float | None, piece_numel: int
) -> dict[str, Any]:
    """One failing call and the call after it."""
    grad, state = torch.randn(1000), ErrorFeedback()
    state.worker_for(grad).normal_()
    before = [grad.clone(), state.worker.clone()]
    result: dict[str, Any] = {"error": "none", "after": "none"}
    began = time.monotonic()
    try:
        all_reduce_(
            grad,
            state,
            compressor,
            group,
            algorithm=algorithm,
            piece_numel=piece_numel,
            validate="off",
            timeout=timeout,
        )
    except CollectiveError as error:
        result |= {"error": type(error).__name__, "text": str(error)}
    result["seconds"] = time.monotonic() - began
    result["unchanged"] = same_bytes(grad, before[0]) and same_bytes(state.worker, before[1])
    result["unchanged"] = result["unchanged"] and state.server is None
    began = time.monotonic()
    try:
        all_reduce_(grad, state, compressor, group, algorithm=algorithm)
    except GroupUnusableError as error:
        result |= {"after": str(error), "seconds_after": time.monotonic() - began}
    return result


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=60)
    mode = sys.argv[2]
    if len(sys.argv) > 3:
        rotation.ROTATE_FROM = int(sys.argv[3])
    midway = mode in ("midway", "pieces")
    algorithms = ("two_phase",) if midway else ("one_phase", "two_phase", "dense")
    # The dense one has the short timeout as its group's own, the others as an argument.
    groups = {
        name: dist.new_group(timeout=timedelta(seconds=TIMEOUT if name == "dense" else 60))
        for name in algorithms
    }
    for group in groups.values():
        if rank == 0:
            time.sleep(0.5)  # late, but within the timeout
        all_reduce_(torch.ones(1000), ErrorFeedback(), Sign(32), group, timeout=TIMEOUT)
    if rank == world_size - 1 and not midway:
        os.kill(os.getpid(), signal.SIGKILL if mode == "kill" else signal.SIGSTOP)
    results = {}
    for name, group in groups.items():
        timeout = None if name == "dense" else TIMEOUT
        compressor = Deadly(5 if mode == "pieces" else 2) if midway else Sign(32)
        piece_numel = 300 if mode in ("pieces", "stop") else 0
        results[name] = survive(compressor, name, group, timeout, piece_numel)
    launcher.report(directory, rank, results)
    launcher.leave()
