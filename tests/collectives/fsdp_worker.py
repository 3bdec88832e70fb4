"""The FSDP hook on four ranks: two replicas of a model, each sharded over two ranks.

With "cuda" behind the directory all four use the first GPU, by NCCL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from bench.nccl.one_device import environment

if __name__ == "__main__" and sys.argv[2:] == ["cuda"]:
    os.environ |= {**environment(int(os.environ["RANK"])), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

import torch

from tests.collectives import fsdp_states, fsdp_training, launcher

CHECKS: dict[str, Callable[[], None]] = {
    name: check
    for module in (fsdp_training, fsdp_states)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


if __name__ == "__main__":
    on_cuda = sys.argv[2:] == ["cuda"]
    directory, rank, _ = launcher.init(backend="nccl" if on_cuda else "gloo")
    if on_cuda:
        torch.set_default_device("cuda:0")
    launcher.report(directory, rank, launcher.run_checks(CHECKS))
    launcher.leave()
