"""One rank of test_collectives.py, a process: joined by a store, then by a process group; then DDP."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.integrations import ddp
from gck.kernels.sign import Sign
from tests.collectives import launcher, scenarios
from tests.collectives.ddp_model import EVERYTHING, TINY_BUCKETS, equal, network, train

if __name__ == "__main__":
    directory, rank, world_size = launcher.init()
    store = dist.FileStore(str(directory / "nccl-store"), world_size)
    with gck.NcclCommunicator.from_store(store, rank, world_size, timeout=30) as comm:
        result = {"scenarios": scenarios.run(rank, world_size, comm)}
    with gck.NcclCommunicator.from_group(timeout=30) as comm:
        result["again"] = scenarios.run(rank, world_size, comm, in_flight=True)
        models = []
        for group in (None, comm):
            model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
            state = ddp.HookState(Sign(32), model=model, group=group, **EVERYTHING)
            model.register_comm_hook(state, ddp.hook)
            train(model, range(4))
            models.append(model)
        result["ddp"] = equal(*models)
    launcher.report(directory, rank, result)
    launcher.leave()
