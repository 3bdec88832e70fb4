"""gck.topk_ef_ on inputs that are hard to select from, beside the common one. See bench/inputs.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gck
from bench import inputs
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan

QUICK = (inputs.GAUSSIAN, "none finite")


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring: the common input first."""
    make = partial(Case, "topk_ef_", "input", dtype=torch.float32, implementation=GCK)
    made = []
    for n in (n for n in plan.sizes if n <= plan.large):
        for name in QUICK if plan.quick else inputs.INPUTS:
            made.append(make(value=name, n=n, run=partial(_keep, inputs.count_of(n)), inputs=name))
        made.append(make(value="all kept", n=n, run=partial(_keep, n)))
        made.append(make(value="all kept, memory reused", n=n, run=_compress, prepare=_with_body))
    return made


def _keep(k: int, buffers: Buffers) -> Any:
    return gck.topk_ef_(buffers.grad, buffers.err, k=k)


def _with_body(buffers: Buffers) -> tuple[Buffers, torch.Tensor]:
    """Memory for the payload that was used before: a new payload of so many bytes is pages to be zeroed."""
    compressor, pool = gck.TopK(ratio=1.0), buffers.pool
    shape = 1, compressor.layout(pool.n).nbytes
    body = pool.made("body", lambda: torch.zeros(shape, dtype=torch.uint8, device=pool.device))
    return buffers, body


def _compress(given: tuple[Buffers, torch.Tensor]) -> None:
    buffers, body = given
    gck.TopK(ratio=1.0).compress_(buffers.grad, buffers.err, body)


def test_topk_inputs(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
