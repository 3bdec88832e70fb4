"""A gradient, taken for a matrix, as the product of two thin ones, with and without error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gck import interop
from gck.kernels.common import checks
from gck.kernels.low_rank import LowRank, check_options
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.payload import LowRankFactors
from gck.statistics import Statistics
from gck.values import plain_int

__all__ = ["low_rank", "low_rank_ef_"]


def low_rank_ef_(
    grad: Array,
    err: Array,
    rank: int = 4,
    *,
    columns: int | None = None,
    seed: int,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> LowRankFactors:
    """Sends the projection of acc = grad + err, taken for a matrix, on few directions; the rest stays in err.

    The directions are those that the products of the matrix with `rank` random rows span: what is large in
    the matrix is large in them, too. What is left is never longer than acc, but for rounding. Deterministic;
    no host synchronisation on CUDA. Runs on torch's current stream.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            Entries that would not be finite become 0: what is not finite travels and never stays. One of
            acc spreads over its row and columns of what is sent, and mostly over all of it.
        rank: rows of left and of right, in [1, 64]; fewer are sent where the matrix has fewer rows or
            columns.
        columns: elements of a row of the matrix, in [1, 2**31 - 1]. Default: of a tensor of two or more
            dimensions, all but the first one together, as in the paper; of a vector, about its square root.
        seed: of the random rows, in [-2**63, 2**63): the same on every rank, and another one at every step,
            such as the step's number. All-reduces keep what they sent last and start from there; alone, each
            call starts anew, and with the same seed what is orthogonal to its directions is never sent. A
            CUDA graph keeps the seed that it was captured with.
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        decay, clip, stats: as for `topk_ef_`.

    Returns:
        LowRankFactors(left (rank, rows), right (rank, columns), numel, columns).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Vogels, Karimireddy and Jaggi, "PowerSGD" (NeurIPS 2019), Algorithm 1, one step of a power
    iteration, with the error feedback of Algorithm 2.
    """
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("low_rank_ef_", ("err",), grad=grad, err=err) as (g, e):
            options: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip, "stats": stats}
            return low_rank_ef_(g, e, rank, columns=columns, seed=seed, **options)
    rank, columns, seed = plain_int(rank), plain_int(columns), plain_int(seed)
    check_options("low_rank_ef_", rank, columns)
    checks.check_seed("low_rank_ef_", seed)
    checks.check_grad("low_rank_ef_", grad)
    columns = _columns("low_rank_ef_", grad, columns)
    beta, limit, measured = checks.residual_options("low_rank_ef_", grad, decay, clip, stats)
    compressor = LowRank(rank, columns, seed, beta)
    compressor.check_inputs("low_rank_ef_", grad, err, nonfinite)
    if plain(grad, err, nonfinite, limit, measured):
        body = compress("low_rank_ef_", compressor, grad, err, nonfinite, limit, stats=measured)
    else:
        given: Any = (grad, err, rank, columns, seed, nonfinite, beta, limit, measured)
        body = torch.ops.gck.low_rank_ef_(*given)
    return _payload(compressor, body, grad.numel())


def low_rank(x: Array, rank: int = 4, *, columns: int | None = None, seed: int) -> LowRankFactors:
    """The projection of x, taken for a matrix, on `rank` directions, without error feedback; x is read only.

    Arguments, result and errors as for `low_rank_ef_`.
    """
    if not isinstance(x, Tensor):
        with interop.borrowed("low_rank", (), x=x) as (tensor,):
            return low_rank(tensor, rank, columns=columns, seed=seed)
    rank, columns, seed = plain_int(rank), plain_int(columns), plain_int(seed)
    check_options("low_rank", rank, columns)
    checks.check_seed("low_rank", seed)
    checks.check_grad("low_rank", x, "x")
    columns = _columns("low_rank", x, columns)
    call = _low_rank if plain(x) else torch.ops.gck.low_rank
    body = call(x, rank, columns, seed)
    return _payload(LowRank(rank, columns, seed), body, x.numel())


def _columns(function: str, grad: Tensor, columns: int | None) -> int:
    """Those that are given, or that follow from the shape of the gradient; at least one, of nothing, too."""
    numel, shape = grad.numel(), tuple(grad.shape)
    if columns is None and len(shape) > 1 and numel:
        check_options(function, 1, numel // shape[0])
    return LowRank(columns=columns).columns_for(shape)


def _payload(compressor: LowRank, body: Tensor, numel: int) -> LowRankFactors:
    left, right = compressor.layout(numel).views(body)
    rows, columns, rank = compressor.shape(numel)
    return LowRankFactors(left.view(rank, rows), right.view(rank, columns), numel, columns)


def _low_rank_ef(
    grad: Tensor,
    err: Tensor,
    rank: int,
    columns: int,
    seed: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    compressor = LowRank(rank, columns, seed, decay)
    return compress("low_rank_ef_", compressor, grad, err, nonfinite, clip, stats=stats)


def _low_rank(x: Tensor, rank: int, columns: int, seed: int) -> Tensor:
    return compress("low_rank", LowRank(rank, columns, seed), x, None, None)


def _fake_low_rank_ef(
    grad: Tensor,
    err: Tensor,
    rank: int,
    columns: int,
    seed: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(LowRank(rank, columns), grad)


def _fake_low_rank(x: Tensor, rank: int, columns: int, seed: int) -> Tensor:
    return fake_body(LowRank(rank, columns), x)


register(
    "low_rank_ef_(Tensor grad, Tensor(a!) err, SymInt rank, SymInt columns, SymInt seed,"
    " Tensor(b!)? nonfinite, float decay=1.0, Tensor? clip=None, Tensor(c!)? stats=None) -> Tensor",
    _low_rank_ef,
    _fake_low_rank_ef,
)
register(
    "low_rank(Tensor x, SymInt rank, SymInt columns, SymInt seed) -> Tensor",
    _low_rank,
    _fake_low_rank,
)
