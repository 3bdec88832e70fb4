"""gck.topk_ef_, with and without a hint, against torch, CuPy and RAFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gck
from bench import inputs, peers
from bench.measure import Buffers, Pool
from bench.suite import GCK, HUGE, Case, Plan
from gck.kernels.topk import resolve_k

RATIOS = (0.0001, 0.001, 0.01, 0.1)
TYPICAL = 0.01


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes_and_huge:
        for dtype in plan.dtypes:
            for ratio in plan.settings(RATIOS, typical=TYPICAL):
                make = partial(Case, "topk_ef_", "ratio", ratio, n, dtype)
                made += [make(GCK, partial(_gck, ratio)), _hinted(make, ratio)]
                # Where a peer takes seconds, it is measured at the typical ratio alone.
                if n < HUGE or plan.device.type == "cuda" or ratio == TYPICAL:
                    made += _peers(make, resolve_k("bench", n, ratio, None), n, dtype, plan)
    return made


def _peers(make: Callable[..., Case], k: int, n: int, dtype: torch.dtype, plan: Plan) -> list[Case]:
    compositions = {"torch composition": peers.torch_topk_ef_}
    if plan.device.type == "cuda" and peers.have_cupy():
        compositions["cupy argpartition"] = peers.cupy_topk_ef_
    if plan.device.type == "cuda" and peers.have_raft():
        compositions["raft select_k"] = peers.raft_topk_ef_
    made = [
        make(name, partial(_call, peer, k), partial(peers.verify_topk, peer, k=k))
        for name, peer in compositions.items()
    ]
    # Its input is fp32 in any case.
    if dtype == torch.float32 and (n < HUGE or plan.device.type == "cuda"):
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


def _hinted(make: Callable[..., Case], ratio: float) -> Case:
    """With the threshold of a step before, whose gradient was another of the same distribution."""

    def prepare(buffers: Buffers) -> tuple[Buffers, torch.Tensor]:
        return buffers, _threshold(buffers.pool, ratio).clone()

    def run(given: tuple[Buffers, torch.Tensor]) -> Any:
        buffers, hint = given
        return gck.topk_ef_(buffers.grad, buffers.err, ratio, hint=hint)

    def verify(pool: Pool) -> None:
        ours, theirs = pool.apart(), pool.apart()
        plain, hinted = gck.topk_ef_(ours.grad, ours.err, ratio), run(prepare(theirs))
        same = (
            torch.equal(plain.values, hinted.values)
            and torch.equal(plain.indices, hinted.indices)
            and torch.equal(ours.err, theirs.err)
        )
        if not same:
            raise peers.PeerMismatchError(f"topk_ef_: a hint changes the result (n={pool.n}, {ratio=})")

    return make("gck, warm hint", run, verify, prepare)


def _threshold(pool: Pool, ratio: float) -> torch.Tensor:
    """The threshold of another draw of the pool's distribution, as gck leaves it in a hint."""

    def find() -> torch.Tensor:
        grad, err = inputs.make(inputs.GAUSSIAN, pool.n + 1)
        grad, err = grad[:-1].to(pool.device, pool.dtype), err[:-1].to(pool.device)
        hint = torch.zeros(1, dtype=torch.int32, device=pool.device)
        gck.topk_ef_(grad, err, ratio, hint=hint)
        return hint

    hint: torch.Tensor = pool.made(("hint", ratio), find)
    return hint


def test_topk_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
