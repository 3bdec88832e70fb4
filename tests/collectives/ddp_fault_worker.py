"""One rank of test_ddp_faults.py: DDP training whose last rank dies, or stalls, before a backward pass.

usage: ddp_fault_worker DIRECTORY KILL | STOP
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gck.errors import CollectiveError
from gck.integrations import ddp
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher
from tests.collectives.test_ddp_faults import TIMEOUT


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    model(inputs).square().mean().backward()


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=20)
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = DistributedDataParallel(inner, bucket_cap_mb=0.02)
    state = ddp.register(model, Sign(32), algorithm="two_phase")
    for step in range(2):  # after the first DDP makes several buckets
        backward(model, step)
    state.timeout = TIMEOUT
    before = [tensor.clone() for _, s in state.residuals.items() for tensor in (s.worker, s.server)]
    if rank == world_size - 1:
        os.kill(os.getpid(), getattr(signal, f"SIG{sys.argv[2]}"))
    result = {"error": "none", "text": ""}
    began = time.monotonic()
    try:
        backward(model, 2)
    except CollectiveError as error:
        result = {"error": type(error).__name__, "text": str(error)}
    result["seconds"] = time.monotonic() - began
    after = [tensor for _, s in state.residuals.items() for tensor in (s.worker, s.server)]
    result["unchanged"] = all(map(same_bytes, before, after)) and state.step == 2
    launcher.report(directory, rank, result)
    launcher.leave()
