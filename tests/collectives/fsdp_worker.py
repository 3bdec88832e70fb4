"""The FSDP hook on four ranks: two replicas of a model, each sharded over two ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch.distributed as dist

from tests.collectives import fsdp_states, fsdp_training, launcher

CHECKS: dict[str, Callable[[], None]] = {
    name: check
    for module in (fsdp_training, fsdp_states)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


if __name__ == "__main__":
    directory, _, _ = launcher.init()
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break  # ranks may be out of step now
    launcher.report(directory, dist.get_rank(), results)
    launcher.leave()
