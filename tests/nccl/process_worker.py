"""One rank of test_collectives.py, a process: the scenarios twice, over a store and over a process group."""

from __future__ import annotations

import torch.distributed as dist

import gck
from tests.collectives import launcher, scenarios

if __name__ == "__main__":
    directory, rank, world_size = launcher.init()
    store = dist.FileStore(str(directory / "nccl-store"), world_size)
    with gck.NcclCommunicator.from_store(store, rank, world_size, timeout=30) as comm:
        result = {"scenarios": scenarios.run(rank, world_size, comm)}
    with gck.NcclCommunicator.from_group(timeout=30) as comm:
        result["again"] = scenarios.run(rank, world_size, comm)
    launcher.report(directory, rank, result)
    launcher.leave()
