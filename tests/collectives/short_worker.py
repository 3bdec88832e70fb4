"""One rank of test_short.py. Rank 1 answers with fewer bytes than rank 0 waits for; rank 0 reports.

argv: elements, and which part of the message is too short.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from gck.collectives import all_reduce_, resolve
from gck.collectives.transports import rotation
from gck.error_feedback import ErrorFeedback
from gck.errors import GckError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher

SHORT = 64  # bytes, as a handshake has

if __name__ == "__main__":
    directory, rank, _ = launcher.init(timeout=30)
    numel, short = int(sys.argv[2]), int(sys.argv[3])
    rotation.ROTATE_FROM = 0
    result: dict[str, object] = {}
    grad, state = torch.randn(numel), ErrorFeedback()
    if rank == 0:
        state.worker_for(grad).normal_()
        before = grad.clone(), state.worker.clone()
        try:
            all_reduce_(grad, state, Sign(64), algorithm="two_phase", validate="off")
        except GckError as error:
            result = {"error": type(error).__name__, "text": str(error)}
        try:
            resolve().barrier()
        except GckError as error:
            result["after"] = type(error).__name__
        result["unchanged"] = same_bytes(grad, before[0]) and same_bytes(state.worker, before[1])
    else:
        message = torch.ones(Sign(64).layout(numel // 2).nbytes, dtype=torch.uint8)
        received = [
            dist.irecv(part.clone(), group_src=0, tag=tag) for tag, part in rotation.parts_of(message)
        ]
        for i, (tag, part) in enumerate(rotation.parts_of(message)):
            dist.isend(part[:SHORT] if i == short else part, group_dst=0, tag=tag).wait()
        for part in received:
            part.wait()
        began = time.monotonic()
        with suppress(RuntimeError):
            dist.recv(message, group_src=0)  # which rank 0 will not send
        result["told"] = time.monotonic() - began
    launcher.report(directory, rank, result)
    until = time.monotonic() + 20
    while not (directory / "1.json").exists() and time.monotonic() < until:
        time.sleep(0.05)  # rank 0 is there, with its connections
    launcher.leave()
