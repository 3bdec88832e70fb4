"""gck.topk_ef_ of few elements, from Python to Python: where the call costs more than the selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gck
from bench import peers
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan
from gck.kernels.topk import resolve_k

SIZES = (1_000, 4_000, 16_000, 64_000, 256_000)
RATIOS = (0.001, 0.01, 0.1)


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.settings(SIZES, typical=4_000):
        for ratio in plan.settings(RATIOS, typical=0.01):
            k = resolve_k("bench", n, ratio, None)
            make = partial(Case, "topk_ef_", "ratio", ratio, n, torch.float32, call=True)
            made += [
                make(GCK, partial(_gck, ratio)),
                make(
                    "torch composition",
                    partial(_composition, k),
                    partial(peers.verify_topk, peers.torch_topk_ef_, k=k),
                ),
                make("torch.topk alone", partial(_select, k), partial(peers.verify_torch_topk, k=k)),
            ]
    return made


def _gck(ratio: float, buffers: Buffers) -> Any:
    return gck.topk_ef_(buffers.grad, buffers.err, ratio)


def _composition(k: int, buffers: Buffers) -> Any:
    return peers.torch_topk_ef_(buffers, k)


def _select(k: int, buffers: Buffers) -> Any:
    return peers.torch_topk(buffers.pool.magnitude, k)


def test_topk_small(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
