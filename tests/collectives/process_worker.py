"""One rank of test_processes.py: the scenarios, then a mismatch, then the group once more.

usage: process_worker DIRECTORY [bytes from which an all-to-all goes in rounds]
"""

from __future__ import annotations

import sys

import torch

from gck.collectives import all_reduce_, resolve
from gck.collectives.transports import rotation
from gck.error_feedback import ErrorFeedback
from gck.errors import CollectiveMismatchError
from gck.kernels.sign import Sign
from tests.collectives import launcher, scenarios

if __name__ == "__main__":
    directory, rank, world_size = launcher.init()
    if len(sys.argv) > 2:
        rotation.ROTATE_FROM = int(sys.argv[2])
    result = {"scenarios": scenarios.run(rank, world_size, None), "timeout": resolve().timeout}

    last = world_size - 1
    grad, state = torch.ones(500 + (rank == last)), ErrorFeedback()
    try:
        all_reduce_(grad, state, Sign(32))
        result["mismatch"] = "none"
    except CollectiveMismatchError as error:
        result["mismatch"] = str(error)
    result["unchanged"] = bool((grad == 1).all()) and state.worker is None
    # Late ranks, another order of arrival, another thread: nothing may depend on it.
    torch.distributed.barrier()
    result["again"] = scenarios.run(rank, world_size, None, in_flight=True)
    launcher.report(directory, rank, result)
    launcher.leave()
