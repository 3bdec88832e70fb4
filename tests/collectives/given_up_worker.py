"""One rank of test_given_up.py: rank 0 gives the group up while an exchange is under way; rank 1 joins.

argv: gather or swap, and perhaps "by default" for torch's choice of a backend; or fail: no rank has memory to
decode its first piece, and all end as programs do; or fail early: rank 0 has none to compress its third
piece, or, fail first, its first.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

import gck
from gck.collectives import all_reduce_, resolve
from gck.errors import GckError
from gck.kernels.sign import Sign
from tests.collectives import launcher

NBYTES = 8 << 20


class Exhausted(Sign):
    """Has no memory to decode."""

    def decompress_mean_(self, *args: Any, **options: Any) -> None:
        raise MemoryError


class Interrupted(Sign):
    """Has none to compress for the n-th time, on rank 0."""

    left = 0

    def compress_(self, *args: Any, **options: Any) -> None:
        if dist.get_rank() == 0 and not Interrupted.left:
            raise MemoryError
        Interrupted.left -= 1
        super().compress_(*args, **options)

    def at(self, start: int) -> Any:
        return self


def cpu_seconds() -> float:
    """Of all threads of this process but for this one."""
    times = os.times()
    return times.user + times.system - time.thread_time()


if __name__ == "__main__":
    directory, rank, _ = launcher.init(60, None if sys.argv[2:] == ["gather", "by default"] else "gloo")
    store = dist.distributed_c10d._get_default_store()
    transport, result = resolve(None), {}
    if sys.argv[2] == "fail":
        began = time.monotonic()
        Interrupted.left = 0 if sys.argv[3:] == ["first"] else 2
        compressor = (Interrupted if sys.argv[3:] else Exhausted)(64)
        grad, state = torch.ones(1 << 22), gck.ErrorFeedback()
        options: dict[str, Any] = {"algorithm": "one_phase", "piece_numel": 1 << 18}
        try:  # of pieces so small that none is there in part: gloo would tell nobody who waits for it
            all_reduce_(grad, state, compressor, **options)
        except (GckError, MemoryError) as error:
            result = {"error": type(error).__name__, "seconds": time.monotonic() - began}
        unchanged = bool(grad.eq(1).all()) and not (state.worker is not None and state.worker.any())
        try:
            all_reduce_(grad, state, compressor, **options)
        except GckError as error:
            result |= {"unchanged": unchanged, "after": type(error).__name__}
        launcher.report(directory, rank, result)
        sys.exit()
    message = torch.full((NBYTES,), rank, dtype=torch.uint8)
    start = {
        "gather": lambda: transport.start_all_gather_bytes(message),
        "swap": lambda: transport.start_all_to_all_bytes(message.view(2, -1)),
    }[sys.argv[2]]
    if rank == 0:
        threading.Timer(0.3, lambda: transport.abort("by another thread")).start()
        began = time.monotonic()
        try:
            start().wait()
        except GckError as error:
            result = {"error": type(error).__name__, "seconds": time.monotonic() - began}
        del message
        store.set("given up", "")
        store.wait(["sent"])
        before, began = cpu_seconds(), time.monotonic()
        time.sleep(1)
        result["busy"] = (cpu_seconds() - before) / (time.monotonic() - began)
        store.set("seen", "")
    else:
        store.wait(["given up"])
        began = time.monotonic()
        try:
            start().wait()
        except GckError as error:
            result = {"error": type(error).__name__, "seconds": time.monotonic() - began}
        store.set("sent", "")
        store.wait(["seen"])
    launcher.report(directory, rank, result)
    launcher.leave()
