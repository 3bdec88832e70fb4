"""gck.decompress and gck.decompress_add_ of gathered top-k payloads, against torch's index_add_."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import gck
from bench import inputs, peers
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan, percent
from gck.kernels.topk import resolve_k

SETTINGS = ((1, 0.001), (1, 0.01), (8, 0.001), (8, 0.01))  # payloads, ratio

Given = tuple[Tensor, list[gck.SparseGrad]]


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for world, ratio in plan.settings(SETTINGS, typical=(8, 0.01)):
        shared = {"prepare": partial(_prepare, world, ratio)}
        value = f"{world} of {percent(ratio)}"
        # Bytes of out: written, or read and written. An entry of a payload has 8.
        for kernel, run, peer, dense in (
            ("decompress", _decompress, _index_add_to_zeros, 4),
            ("decompress_add_", _decompress_add_, _index_add_, 8),
        ):
            traffic = 8 * world * ratio + dense
            make = partial(Case, kernel, "payloads", value, n, torch.float32, bytes=traffic, **shared)
            made.append(make(GCK, run))
            made.append(make("torch index_add_", peer, partial(_verify, run, peer, world, ratio)))
            if kernel == "decompress":
                verify = partial(_verify, run, _decompress_anew, world, ratio)
                made.append(make("gck, new tensor", _decompress_anew, verify))
    return made


def _prepare(world: int, ratio: float, buffers: Buffers) -> Given:
    """(a tensor to decode to, payloads of as many ranks in one buffer, as they are gathered)."""
    pool = buffers.pool
    return buffers.err, pool.made((world, ratio), lambda: _gathered(pool, world, ratio))


def _gathered(pool: Pool, world: int, ratio: float) -> list[gck.SparseGrad]:
    n = pool.n
    layout = gck.TopK(k=resolve_k("bench", n, ratio, None)).layout(n)
    rows = torch.zeros(world, layout.nbytes, dtype=torch.uint8, device=pool.device)
    for rank, row in enumerate(rows):
        grad, err = inputs.make(inputs.GAUSSIAN, n + rank)
        grad, err = grad[:n].to(pool.device), err[:n].to(pool.device)
        gck.TopK(ratio=ratio).compress_(grad, err, row.unsqueeze(0))
    return [gck.SparseGrad(*layout.views(row), n) for row in rows]


def _decompress(given: Given) -> Tensor:
    out, payloads = given
    return gck.decompress(payloads, out=out)


def _decompress_anew(given: Given) -> Tensor:
    return gck.decompress(given[1])


def _decompress_add_(given: Given) -> Tensor:
    out, payloads = given
    return gck.decompress_add_(out, payloads)


def _index_add_(given: Given) -> Tensor:
    out, payloads = given
    for payload in payloads:
        out.index_add_(0, payload.indices, payload.values)
    return out


def _index_add_to_zeros(given: Given) -> Tensor:
    given[0].zero_()
    return _index_add_(given)


def _verify(
    run: Callable[[Given], Tensor],
    peer: Callable[[Given], Tensor],
    world: int,
    ratio: float,
    pool: Pool,
) -> None:
    ours, theirs = (call(_prepare(world, ratio, pool.apart())) for call in (run, peer))
    if not torch.equal(ours, theirs):
        raise peers.PeerMismatchError(
            f"decompress: {peer.__name__} and gck disagree (n={pool.n}, {world} payloads of {ratio=})"
        )


def test_decode(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
