"""One rank of test_forked.py: forks after a collective, and the child calls others on the parent's group."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gck.collectives import all_reduce_, resolve
from gck.errors import GckError
from gck.kernels.sign import Sign
from tests.collectives import launcher


def in_a_child(calls: list[Callable[[], Any]]) -> list[dict[str, Any]]:
    """What each of the calls raised in a forked process, and how long it took."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        results = []
        for call in calls:
            began = time.monotonic()
            try:
                call()
                error = ("nothing", "")
            except GckError as raised:
                error = (type(raised).__name__, str(raised))
            results.append({"error": error, "seconds": time.monotonic() - began})
        os.write(writing, json.dumps(results).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        results = json.loads(answer.read())
    os.waitpid(child, 0)
    return list(results)


if __name__ == "__main__":
    directory, rank, _ = launcher.init()
    unknown = in_a_child([lambda: all_reduce_(torch.ones(1000), None, Sign(), timeout=2)])  # gck met no group
    transport = resolve(None)  # known before the fork; the group of two ranks below is not
    new = dist.new_group()
    mean = all_reduce_(torch.full((1000,), float(rank)), None, Sign())
    reports = in_a_child(
        [
            lambda: all_reduce_(torch.ones(1000), None, Sign(), timeout=2),
            lambda: all_reduce_(torch.ones(1000), None, Sign(), async_op=True).wait(),
            lambda: transport.all_gather_bytes(torch.zeros(8, dtype=torch.uint8)),
            lambda: resolve(new),
        ]
    )
    again = all_reduce_(torch.full((1000,), float(rank)), None, Sign())
    launcher.report(directory, rank, {"child": unknown + reports, "same": bool(torch.equal(mean, again))})
    launcher.leave()
