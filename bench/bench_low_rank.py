"""gck.low_rank_ef_ against torch: products of matrices, and a QR decomposition between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gck
from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError
from bench.suite import GCK, Case, Plan
from gck.kernels.low_rank import LowRank

RANKS = (1, 4, 16)
SEED = 1
# Of the norm of what is decoded: its sums are of other orders, and bf16 products of torch's own precision.
TOLERANCE = 1e-4


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring; a vector is a matrix with about as many rows as columns."""
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for rank in plan.settings(RANKS, typical=4):
                make = partial(Case, "low_rank_ef_", "rank", rank, n, dtype)
                made.append(make(GCK, partial(_gck, rank)))
                made.append(make("torch composition", partial(composition, rank), partial(verify, rank)))
    return made


def _gck(rank: int, buffers: Buffers) -> Any:
    return gck.low_rank_ef_(buffers.grad, buffers.err, rank, seed=SEED)


def composition(rank: int, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """(left, right); the residual is what they leave. PyTorch's hook does the same between all-reduces."""
    n = buffers.grad.numel()
    compressor = LowRank(rank, seed=SEED)
    rows, columns, _ = compressor.shape(n)
    acc = torch.zeros(rows * columns, device=buffers.err.device)  # a whole last row
    torch.add(buffers.err, buffers.grad, out=acc[:n])
    matrix, basis = acc.view(rows, columns), _basis(compressor, n, acc.device)
    left, _ = torch.linalg.qr(matrix @ basis.T)
    right = left.T @ matrix
    matrix -= left @ right
    buffers.err.copy_(acc[:n])
    return left.T, right


_bases: dict[tuple[LowRank, int, torch.device], Tensor] = {}


def _basis(compressor: LowRank, n: int, device: torch.device) -> Tensor:
    """Drawn once: a training loop would keep it."""
    key = compressor, n, device
    if key not in _bases:
        _bases[key] = compressor.basis(n, device)
    return _bases[key]


def verify(rank: int, pool: Pool) -> None:
    """The same product and residual, to within rounding; rows of the factors may have another sign."""
    ours, theirs = pool.apart(), pool.apart()
    payload = gck.low_rank_ef_(ours.grad, ours.err, rank, seed=SEED)
    left, right = composition(rank, theirs)
    sent = gck.decompress(payload)
    wanted = (left.T @ right).view(-1)[: pool.n]
    limit = TOLERANCE * float(wanted.norm())
    if not (float((sent - wanted).norm()) <= limit and float((ours.err - theirs.err).norm()) <= limit):
        raise PeerMismatchError(f"low_rank_ef_: torch and gck disagree (n={pool.n}, rank={rank})")


def test_low_rank_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
