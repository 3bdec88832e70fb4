"""One rank of test_processes.py. The last rank dies or stalls; the others report what they saw.

usage: fault_worker DIRECTORY kill | stop | midway
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

import gck
from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedback
from gck.kernels.sign import Sign
from tests.collectives import launcher
from tests.collectives.fault_worker import TIMEOUT, Deadly, survive

if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=60)
    mode = sys.argv[2]
    algorithms = ("two_phase",) if mode == "midway" else ("one_phase", "two_phase", "dense")
    comms = {name: gck.NcclCommunicator.from_group(timeout=TIMEOUT) for name in algorithms}
    for comm in comms.values():
        all_reduce_(torch.ones(1000), ErrorFeedback(), Sign(32), comm)
    dist.barrier()
    if rank == world_size - 1 and mode != "midway":
        os.kill(os.getpid(), signal.SIGKILL if mode == "kill" else signal.SIGSTOP)
    results = {}
    for name, comm in comms.items():
        results[name] = survive(Deadly(2) if mode == "midway" else Sign(32), name, comm, None, 0)
    launcher.report(directory, rank, results)
    launcher.leave()
