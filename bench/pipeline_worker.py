"""One rank of bench.pipeline: `python -m bench.pipeline_worker ASSIGNMENT`, which is JSON.

It reports a "begin" before a case, and "done" with its times after it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gck
from bench.machine import bind
from bench.together import start_together
from gck.cli.crew import end_with, event_stream, tell
from gck.cli.links import read_counters

COMPRESSORS = {"sign, 256": gck.Sign(), "4 bits, 256": gck.Quantize(bits=4)}
LIMIT = 120.0  # seconds that an operation may take


def main(argv: list[str]) -> None:
    assignment: dict[str, Any] = json.loads(argv[1])
    end_with(assignment["parent"])
    events = event_stream()
    bind(assignment["rank"], assignment["world_size"])
    torch.set_num_threads(1)  # the ranks share one machine
    rank = assignment["rank"]
    dist.init_process_group(
        "gloo",
        init_method=(Path(assignment["folder"]) / "rendezvous").as_uri(),
        rank=rank,
        world_size=assignment["world_size"],
        timeout=timedelta(seconds=LIMIT),
    )
    for case in assignment["cases"]:
        tell(events, event="begin")
        tell(events, event="done", **_measure(rank, assignment, **case))
    dist.barrier()  # nobody may leave while another still talks to it
    events.close()
    sys.stderr.flush()
    os._exit(0)  # destroying groups may hang, see gck.cli.demo.worker


def _measure(rank: int, assignment: dict[str, Any], name: str, numel: int) -> dict[str, Any]:
    """Seconds of every repeat by piece_numel; these take turns, so that what else runs here hits all."""
    compressor, grad = COMPRESSORS[name], torch.empty(numel, dtype=torch.float32)
    state = gck.ErrorFeedback()
    seconds: dict[int, list[float]] = {piece: [] for piece in assignment["pieces"]}
    sent: dict[int, int] = {}
    bits: set[int] = set()
    for repeat in range(assignment["repeats"] + 1):
        for piece in seconds:
            if not repeat:
                grad.normal_(generator=torch.Generator().manual_seed(rank))
            before = read_counters(assignment["interface"])
            start_together()
            began = time.perf_counter()
            gck.all_reduce_(grad, state, compressor, algorithm="two_phase", piece_numel=piece)
            elapsed = time.perf_counter() - began
            dist.barrier()
            sent[piece] = (read_counters(assignment["interface"]) - before).tx_bytes
            if repeat:  # the first one makes residuals, and ranks compare what they call
                seconds[piece].append(elapsed)
            else:
                bits.add(_fingerprint(grad, state))
                if piece != assignment["pieces"][-1]:
                    state.reset()
    return {"seconds": list(seconds.values()), "sent": list(sent.values()), "same_bits": len(bits) == 1}


def _fingerprint(grad: Tensor, state: gck.ErrorFeedback) -> int:
    """Of the result and both residuals."""
    parts = [grad, *(residual for residual in (state.worker, state.server) if residual is not None)]
    return hash(tuple(int(part.view(torch.int32).sum()) for part in parts))


if __name__ == "__main__":
    main(sys.argv)
