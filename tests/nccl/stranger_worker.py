"""One of two ranks that do not belong together: with NCCL's real library, or the tests' own.

usage: stranger_worker DIRECTORY TIMEOUT [real]; real: on a GPU, of which each rank claims to have one
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from bench.nccl.one_device import environment

# What NCCL reads when it starts.
if __name__ == "__main__" and sys.argv[3:] == ["real"]:
    os.environ |= environment(int(os.environ["RANK"]))

import torch
import torch.distributed as dist

import gck
from gck.errors import GckError
from tests.collectives import launcher


def outcome(join: Callable[[], gck.NcclCommunicator]) -> tuple[str, str, float]:
    """The error's name, its text, and seconds until it came."""
    began, kind, text = time.monotonic(), "none", ""
    try:
        join().abort("it was not to be")
    except GckError as error:
        kind, text = type(error).__name__, str(error)
    return kind, text, time.monotonic() - began


def unique_ids() -> list[bytes]:
    """A new one of each rank, on all ranks."""
    ids: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(ids, gck.NcclCommunicator.create_unique_id())
    return ids


def main(rank: int, timeout: float) -> dict[str, tuple[str, str, float]]:
    found = {}
    wrong: dict[str, Callable[[list[bytes]], tuple[bytes, int, int]]] = {
        "other ids": lambda ids: (ids[rank], rank, 2),
        "other sizes": lambda ids: (ids[0], rank, 2 + rank),
        "the same rank": lambda ids: (ids[0], 0, 2),
        "no id": lambda ids: (bytes(128), rank, 2),
    }
    for name, arguments in wrong.items():
        taken = arguments(unique_ids())
        found[name] = outcome(lambda taken=taken: gck.NcclCommunicator(*taken, timeout=timeout))  # type: ignore[misc]
        dist.barrier()
    used = unique_ids()[0]
    with gck.NcclCommunicator(used, rank, 2, timeout=60) as comm:
        comm.barrier()
    dist.barrier()
    found["used before"] = outcome(lambda: gck.NcclCommunicator(used, rank, 2, timeout=timeout))
    dist.barrier()
    # After all that, those that belong together still meet.
    with gck.NcclCommunicator(unique_ids()[0], rank, 2, timeout=60) as comm:
        assert comm.all_gather(torch.tensor([rank], device=comm.device)).tolist() == [[0], [1]]
    return found


if __name__ == "__main__":
    directory, rank, _ = launcher.init(timeout=120)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.zeros(1, device="cuda")  # what a context takes is not what refusing takes
    launcher.report(directory, rank, main(rank, float(sys.argv[2])))
    launcher.leave()
