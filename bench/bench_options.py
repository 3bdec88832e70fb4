"""What decay, clip and statistics of the residual cost inside the kernels, beside torch's operations around a
kernel without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gck
from bench import peers
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan
from gck.kernels.topk import resolve_k
from gck.wire import body_of

DECAY, CLIP, RATIO = 0.9, 1.0, 0.01
NONE, READ, MEASURED, ALL = "none", "decay, clip", "statistics", "all"
OPTIONS = (NONE, READ, MEASURED, ALL)
KERNELS: dict[str, Callable[..., Any]] = {
    "sign_ef_": partial(gck.sign_ef_, chunk_size=256),
    "quantize_ef_": partial(gck.quantize_ef_, bits=8),
    "chunk_topk_ef_": partial(gck.chunk_topk_ef_, chunk_size=4096, k=64),
    "topk_ef_": partial(gck.topk_ef_, ratio=RATIO),
    "random_k_ef_": partial(gck.random_k_ef_, ratio=RATIO, seed=1),
}


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for kernel in plan.settings(tuple(KERNELS), typical="sign_ef_"):
        for options in plan.settings(OPTIONS, typical=ALL):
            make = partial(Case, kernel, "options", options, plan.large, torch.float32)
            made.append(make(GCK, partial(_gck, kernel, options)))
            if options != NONE:
                run, verify = partial(_around, kernel, options), partial(_verify, kernel, options)
                made.append(make("torch, then gck", run, verify))
    return made


def _gck(kernel: str, options: str, buffers: Buffers) -> tuple[Any, Tensor | None]:
    stats = gck.Statistics.empty(buffers.err.device) if options in (MEASURED, ALL) else None
    read = {"decay": DECAY, "clip": CLIP} if options in (READ, ALL) else {}
    payload = KERNELS[kernel](buffers.grad, buffers.err, stats=stats, **read)
    return payload, None if stats is None else stats.values


def _around(kernel: str, options: str, buffers: Buffers) -> tuple[Any, Tensor | None]:
    """The same, each option a pass or more of torch's."""
    grad, err = buffers.grad, buffers.err
    if options in (READ, ALL):
        err.mul_(DECAY).clamp_(-CLIP, CLIP)
    if options == READ:
        return KERNELS[kernel](grad, err), None
    acc = grad + err
    norms = [acc.abs().sum(dtype=torch.float64), _sum_of_squares(acc)]
    wild = acc.numel() - acc.isfinite().sum()
    payload = KERNELS[kernel](grad, err)
    selected = torch.tensor(_selected(kernel, err.numel()), device=err.device)
    return payload, torch.stack([*norms, _sum_of_squares(err), wild.double(), selected.double()])


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _selected(kernel: str, numel: int) -> int:
    if kernel in ("topk_ef_", "random_k_ef_"):
        return resolve_k("bench", numel, RATIO, None)
    if kernel == "chunk_topk_ef_":
        return numel // 4096 * 64 + min(numel % 4096, 64)
    return numel


def _verify(kernel: str, options: str, pool: Pool) -> None:
    """The same bytes in payload and residual; sums in another order are near."""
    ours, theirs = pool.apart(), pool.apart()
    payload, stats = _gck(kernel, options, ours)
    other, norms = _around(kernel, options, theirs)
    same = torch.equal(body_of(*payload.fields), body_of(*other.fields)) and torch.equal(ours.err, theirs.err)
    if stats is not None and norms is not None:
        same = same and torch.allclose(stats, norms, rtol=1e-6)
    if not same:
        raise peers.PeerMismatchError(f"{kernel}: options inside and around the kernel disagree ({options})")


def test_options(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
