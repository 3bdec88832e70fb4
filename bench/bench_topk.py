"""gck.topk_ef_ against torch and CuPy."""

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

RATIOS = (0.0001, 0.001, 0.01, 0.1)


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for ratio in plan.settings(RATIOS, typical=0.01):
                make = partial(Case, "topk_ef_", "ratio", ratio, n, dtype)
                made.append(make(GCK, partial(_gck, ratio)))
                made += _peers(make, resolve_k("bench", n, ratio, None), dtype, plan)
    return made


def _peers(make: Callable[..., Case], k: int, dtype: torch.dtype, plan: Plan) -> list[Case]:
    compositions = {"torch composition": peers.torch_topk_ef_}
    if plan.device.type == "cuda" and peers.have_cupy():
        compositions["cupy argpartition"] = peers.cupy_topk_ef_
    made = [
        make(name, partial(_call, peer, k), partial(peers.verify_topk, peer, k=k))
        for name, peer in compositions.items()
    ]
    if dtype == torch.float32:  # its input is fp32 in any case
        made.append(
            make(
                "torch.topk alone",
                lambda b: peers.torch_topk(b.pool.magnitude, k),
                partial(peers.verify_torch_topk, k=k),
            )
        )
    return made


def _gck(ratio: float, buffers: Buffers) -> Any:
    return gck.topk_ef_(buffers.grad, buffers.err, ratio)


def _call(peer: Callable[[Buffers, int], Any], k: int, buffers: Buffers) -> Any:
    return peer(buffers, k)


def test_topk_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
