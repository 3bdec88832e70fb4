"""Residuals of rank 1 of 3, and how the tests of files save, load and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, ServerBinding
from tests.cases import same_bytes

RANK, WORLD, STEP = 1, 3, 40
SIGN = gck.Sign(chunk_size=32)
NUMELS = {"layer.weight": 100, "größe/0": 7, "empty": 0}


def used(fill: float = 0.0) -> ErrorFeedbackMap:
    """Residuals with every sign of zero, a denormal, and a state that was never used."""
    residuals = ErrorFeedbackMap()
    generator = torch.Generator().manual_seed(5)
    for name, numel in NUMELS.items():
        shard = gck.shard_numel(numel, 32, WORLD)
        worker = residuals[name].worker_for(torch.ones(numel)).normal_(generator=generator)
        worker[:2] = torch.tensor([-0.0, 1e-42])[:numel]
        server = residuals[name].server_for(shard, torch.device("cpu"), ServerBinding(RANK, WORLD, 32))
        server.normal_(generator=generator).add_(fill)
    residuals["layer.weight"].nonfinite_for(torch.device("cpu")).fill_(9)
    assert "fresh" not in residuals
    residuals["fresh"].rescale_(1)
    return residuals


def save(directory: Path, state: Any = None, **options: Any) -> Path:
    place = {"rank": RANK, "world_size": WORLD, "step": STEP, "compressor": SIGN, "shared": False}
    return gck.save_state(directory, used() if state is None else state, **(place | options))


def load(directory: Path, state: Any, **options: Any) -> int | None:
    place = {"rank": RANK, "world_size": WORLD, "step": STEP, "compressor": SIGN, "shared": False}
    loaded = gck.load_state(directory, state, **(place | options))
    return None if loaded is None else loaded.step


def equal(a: ErrorFeedbackMap, b: ErrorFeedbackMap) -> bool:
    """The same names and bytes."""

    def content(state: ErrorFeedback) -> list[Any]:
        return [state.worker, state.server, state.nonfinite]

    return sorted(a) == sorted(b) and all(
        state.binding == b[name].binding
        and all(
            (x is None and y is None) or (x is not None and y is not None and same_bytes(x, y))
            for x, y in zip(content(state), content(b[name]), strict=True)
        )
        for name, state in a.items()
    )
