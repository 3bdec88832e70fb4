"""One rank of test_outages.py: all-reduces, one after another, while the network comes and goes.

usage: outage_worker DIRECTORY TIMEOUT STEPS
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher

NUMEL = 20_000

if __name__ == "__main__":
    directory, rank, _ = launcher.init(timeout=60)
    timeout, steps = float(sys.argv[2]), int(sys.argv[3])
    state, bits, seconds, result = ErrorFeedback(), [], [], {"error": "none", "unchanged": True}
    state.worker_for(torch.zeros(NUMEL))
    dist.barrier()
    (directory / f"{rank}.begun").touch()
    for step in range(steps):
        grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank + 100 * step))
        before = grad.clone(), state.worker.clone()
        began = time.monotonic()
        try:
            all_reduce_(grad, state, Sign(64), algorithm="two_phase", validate="off", timeout=timeout)
        except CollectiveError as error:
            same = same_bytes(grad, before[0]) and same_bytes(state.worker, before[1])
            result = {"error": type(error).__name__, "text": str(error), "unchanged": same}
        seconds.append(time.monotonic() - began)
        if result["error"] != "none":
            break
        bits.append(grad.view(torch.int32).long().sum().item())
        time.sleep(0.02)
    launcher.report(directory, rank, result | {"bits": bits, "seconds": seconds})
    launcher.leave()
