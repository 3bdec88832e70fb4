"""One rank of test_asked.py: all-gathers whose messages are asked for before there is something to send.

argv: batches: of more pieces than are under way together, the last of them short; device: new tensors are on
another device by default; asking: rank 0 has no memory for the third of what it asks for; forgotten: none to
compress with, after which the group is forgotten; tiers: likewise, in two nodes of two ranks.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist

from gck import HierarchicalGroup
from gck.collectives import all_reduce_
from gck.collectives.transports import process_group, ring
from gck.error_feedback import ErrorFeedback
from gck.errors import GckError
from gck.kernels.sign import Sign
from tests.cases import same_bytes
from tests.collectives import launcher

NUMEL = 1 << 20
PIECES: dict[str, Any] = {"algorithm": "one_phase", "piece_numel": 1 << 18}  # messages of 48 KiB


class Unable(Sign):
    """Has no memory on rank 0."""

    def compress_(self, *args: Any, **options: Any) -> None:
        if dist.get_rank() == 0:
            raise MemoryError
        super().compress_(*args, **options)


class Third(ring.Ring):
    """There is no memory for the third one on rank 0."""

    made = 0

    def __init__(self, *args: Any) -> None:
        Third.made += 1
        if Third.made == 3 and dist.get_rank() == 0:
            raise MemoryError
        super().__init__(*args)


def outcome(compressor: Any, group: Any = None) -> dict[str, Any]:
    """A call, and the one after it."""
    result: dict[str, Any] = {}
    for name in ("error", "after"):
        began = time.monotonic()
        try:
            all_reduce_(torch.ones(NUMEL), None, compressor, group, **PIECES)
        except (GckError, MemoryError) as error:
            result[name] = type(error).__name__
        result[f"seconds of {name}"] = time.monotonic() - began
    return result


def in_batches(rank: int) -> bool:
    """Whether gradients and residuals are those of a call without pieces, at every step."""
    numel, piece_numel = 17 * (1 << 17) + 1000, 1 << 17  # messages of 24 KiB, and one of 188 bytes
    generator = torch.Generator().manual_seed(rank)
    states = ErrorFeedback(), ErrorFeedback()
    same = True
    for _ in range(3):
        grad = torch.randn(numel, generator=generator)
        grads = grad, grad.clone()
        for each, state, size in zip(grads, states, (piece_numel, 0), strict=True):
            all_reduce_(each, state, Sign(64), algorithm="one_phase", piece_numel=size)
        pieces, whole = states
        assert pieces.worker is not None
        assert whole.worker is not None
        same = same and same_bytes(*grads) and same_bytes(pieces.worker, whole.worker)
    return same


def on_another_device(rank: int) -> list[float]:
    """The means of what comes back."""
    torch.set_default_device("meta")
    means = []
    for options in (PIECES, {"algorithm": "one_phase"}, {"algorithm": "two_phase", "piece_numel": 1 << 19}):
        grad = torch.full((NUMEL,), 1.0 + rank, device="cpu")
        all_reduce_(grad, None, Sign(64), **options)
        means.append(float(grad.mean()))
    torch.set_default_device("cpu")
    return means


def is_forgotten() -> bool:
    """Whether nothing holds the group, once it is destroyed."""
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    until = time.monotonic() + 20
    while group() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    return group() is None


if __name__ == "__main__":
    directory, rank, _ = launcher.init(60, "gloo")
    if sys.argv[2] == "batches":
        report: Any = in_batches(rank)
    elif sys.argv[2] == "device":
        report = on_another_device(rank)
    elif sys.argv[2] == "asking":
        process_group.Ring = Third  # type: ignore[misc]
        report = outcome(Sign(64))
    elif sys.argv[2] == "tiers":
        report = outcome(Unable(64), HierarchicalGroup.from_group(local_world_size=2))
    else:
        report = outcome(Unable(64))
        report["forgotten"] = rank != 0 or is_forgotten()
    launcher.report(directory, rank, report)
    launcher.leave()
