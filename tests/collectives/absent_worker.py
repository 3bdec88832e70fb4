"""One rank of test_absent.py. The last rank is there, but calls nothing; the others report what they saw.

usage: absent_worker DIRECTORY [alone]; alone: the last rank never comes at all
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gck.collectives import HierarchicalGroup, all_reduce_, resolve
from gck.collectives.transports import rotation
from gck.error_feedback import ErrorFeedback
from gck.errors import GckError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher
from tests.collectives.test_absent import NUMEL, TIMEOUT, WORLD_SIZE


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    began, result = time.monotonic(), {"error": "none", "text": ""}
    try:
        call()
    except (GckError, KeyboardInterrupt) as error:
        result = {"error": type(error).__name__, "text": str(error)}
    return result | {"seconds": time.monotonic() - began}


def reduced(group: Any, begin: Callable[[], None] = lambda: None, **options: Any) -> dict[str, Any]:
    """One all-reduce, what became of its tensors, and the call after it."""
    grad, state = torch.randn(NUMEL), ErrorFeedback()
    state.worker_for(grad).normal_()
    before = grad.clone(), state.worker.clone()

    def reduce() -> None:
        begin()
        all_reduce_(grad, state, Sign(64), group, **options)

    result = outcome(reduce)
    same = same_bytes(grad, before[0]) and same_bytes(state.worker, before[1]) and state.server is None
    return result | {"unchanged": same, "after": outcome(lambda: all_reduce_(grad, state, Sign(64), group))}


def interrupted(group: Any, **options: Any) -> dict[str, Any]:
    """Ctrl-C while it waits, which it would for a minute. No other rank calls anything in this group: if one
    was interrupted a little sooner, that one's end would be what this one hears of."""
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    return reduced(group, timer.start, timeout=60, **options)


def destroyed(directory: Path, rank: int) -> dict[str, Any]:
    """The group is destroyed, and forgotten, while rounds of an all-to-all wait for rank 0.

    Rank 0 starts once the others have destroyed theirs; its own rounds may be over before it looks.
    """
    group = dist.new_group(timeout=timedelta(seconds=10))
    transport = resolve(group)
    send = torch.arange(WORLD_SIZE * NUMEL).view(WORLD_SIZE, NUMEL).to(torch.uint8) + 10 * rank
    dist.barrier()
    if rank == 0:
        wait_for(directory, "destroyed", range(1, WORLD_SIZE))
    started = transport.start_all_to_all_bytes(send)
    rounds = [thread for thread in threading.enumerate() if thread.name == "gck rotation"]
    assert rank == 0 or len(rounds) == 1
    dist.destroy_process_group(group)
    del group
    gc.collect()
    (directory / f"{rank}.destroyed").touch()
    result = outcome(lambda: None)
    try:
        received = started.wait()
        right = torch.stack([send[rank] - 10 * rank + 10 * other for other in range(WORLD_SIZE)])
        result["right"] = bool((received == right).all())
    except GckError as error:
        result |= {"error": type(error).__name__, "text": str(error)}
    for thread in rounds:
        thread.join()
    return result


def wait_for(directory: Path, what: str, ranks: Iterable[int]) -> None:
    while not all((directory / f"{rank}.{what}").exists() for rank in ranks):
        time.sleep(0.01)


def joins(directory: Path, rank: int) -> dict[str, Any]:
    """Two ranks of three; that is torch's own business, and torch's own error."""
    results = {}
    for name, seconds in (("one", TIMEOUT), ("another", 2 * TIMEOUT)):
        began = time.monotonic()
        try:
            dist.init_process_group(
                "gloo",
                init_method=(directory / name).as_uri(),
                rank=rank,
                world_size=WORLD_SIZE,
                timeout=timedelta(seconds=seconds),
            )
        except RuntimeError as error:
            results[name] = {"text": str(error), "seconds": time.monotonic() - began}
    return results


if __name__ == "__main__":
    if len(sys.argv) > 2:
        folder, place = Path(sys.argv[1]), int(os.environ["RANK"])
        launcher.report(folder, place, joins(folder, place))
        launcher.leave()
    directory, rank, _ = launcher.init(timeout=60)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rotation.ROTATE_FROM = 0
    results = {"destroyed": destroyed(directory, rank)}
    waiting = {
        "handshake": lambda group: reduced(group, timeout=TIMEOUT),
        "rounds": lambda group: reduced(group, timeout=TIMEOUT, validate="off", algorithm="two_phase"),
        "dense": lambda group: reduced(group, timeout=TIMEOUT, validate="off", algorithm="dense"),
        "Ctrl-C in the handshake": interrupted,
        "Ctrl-C in rounds": lambda group: interrupted(group, validate="off", algorithm="two_phase"),
        "Ctrl-C in a dense one": lambda group: interrupted(group, validate="off", algorithm="dense"),
    }
    callers = range(WORLD_SIZE - 1)
    groups = {name: [dist.new_group() for _ in callers] for name in waiting}
    if rank in callers:
        for name, call in waiting.items():
            results[name] = call(groups[name][rank if name.startswith("Ctrl-C") else 0])
        results["split"] = outcome(lambda: HierarchicalGroup.from_group(local_world_size=3, timeout=TIMEOUT))
        (directory / f"{rank}.done").touch()
    wait_for(directory, "done", callers)
    launcher.report(directory, rank, results)
    launcher.leave()
