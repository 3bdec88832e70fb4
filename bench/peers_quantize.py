"""Peers of gck.quantize_ef_, and of chunk top-k with two bits by means, in torch operations."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import gck
from bench.codes import of_levels, pack, signed, spread, two_levels, unpack
from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError, accumulate_

__all__ = [
    "acc_of",
    "have_quantize_per_channel",
    "torch_chunk_topk_means_ef_",
    "torch_means_ef_",
    "torch_quantize_ef_",
    "torch_quantize_per_channel",
    "verify_means",
    "verify_quantize",
    "verify_quantize_per_channel",
    "verify_stochastic",
]

# Of codes: where a quotient lies so near the middle of two that another way of dividing rounds it otherwise.
MOST_MIDDLES = 1e-5
STANDARD_ERRORS = 6  # that a mean may be off by: 2e-9 of all normal numbers are farther off


def torch_quantize_ef_(
    buffers: Buffers, bits: int, chunk_size: int, *, stochastic: bool = False
) -> tuple[Tensor, Tensor]:
    """Error-feedback quantisation by the largest magnitude, composed of torch operations: to nearest, or
    up or down by torch's random numbers.

    Returns (uint8 bytes, little end first; scales).
    """
    acc = accumulate_(buffers.grad, buffers.err)
    qmax = 2 ** (bits - 1) - 1
    packed, scales = [], []
    for rows in _chunks(acc, chunk_size):
        # By a number, torch would multiply by the reciprocal on CUDA, which rounds otherwise.
        scale = rows.abs().amax(1, keepdim=True).div_(torch.tensor(float(qmax), device=acc.device))
        codes = rows * scale.reciprocal()
        if stochastic:
            codes.add_(torch.rand_like(codes)).floor_().clamp_(-qmax, qmax)
        else:
            codes.round_()
        rows.sub_(codes * scale)
        packed.append(pack(codes, bits))
        scales.append(scale.view(-1))
    return torch.cat(packed), torch.cat(scales)


def torch_means_ef_(buffers: Buffers, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Error-feedback quantisation to a sign and one of two means, composed of torch operations.

    Returns (uint8 bytes, little end first; (chunks, 2) levels).
    """
    acc = accumulate_(buffers.grad, buffers.err)
    packed, levels = [], []
    for rows in _chunks(acc, chunk_size):
        codes, two = two_levels(rows, chunk_size)
        rows.sub_(of_levels(codes, two[:, :1], two[:, 1:]))
        packed.append(pack(codes, 2))
        levels.append(two)
    return torch.cat(packed), torch.cat(levels)


def torch_chunk_topk_means_ef_(buffers: Buffers, chunk_size: int, k: int) -> tuple[Tensor, Tensor]:
    """Error-feedback top-k of every chunk, with two bits a value, composed of torch operations.

    Returns (uint8 bytes of the codes, little end first; positions in chunks), chunk by chunk.
    """
    acc = accumulate_(buffers.grad, buffers.err)
    slots = 1 << (k - 1).bit_length()
    packed, indices = [], []
    for rows in _chunks(acc, chunk_size):
        local = torch.topk(rows.abs(), min(k, rows.shape[1]), sorted=False).indices.sort(1).values
        there = rows.gather(1, local)
        codes, two = two_levels(there, slots)
        rows.scatter_(1, local, there - of_levels(codes, two[:, :1], two[:, 1:]))
        packed.append(pack(codes, 2))
        indices.append(local.view(-1))
    return torch.cat(packed), torch.cat(indices)


def _chunks(acc: Tensor, chunk_size: int) -> list[Tensor]:
    """Views of whole chunks, and of what is left behind them."""
    whole = acc.numel() // chunk_size * chunk_size
    views = acc[:whole].view(-1, chunk_size), acc[whole:].view(1, -1)
    return [rows for rows in views if rows.numel()]


def have_quantize_per_channel() -> bool:
    """torch says that it will go."""
    return hasattr(torch, "quantize_per_channel")


def acc_of(buffers: Buffers, chunk_size: int) -> Tensor:
    """grad + err of whole chunks, made beforehand."""
    pool = buffers.pool

    def make() -> Tensor:
        return (buffers.grad32 + pool.saved)[: pool.n // chunk_size * chunk_size].view(-1, chunk_size)

    rows: Tensor = pool.made(("acc", chunk_size), make)
    return rows


def torch_quantize_per_channel(rows: Tensor) -> Tensor:
    """8 bits, by the largest magnitude of each row: what PyTorch's quantising hooks of DDP are named after.
    Nothing is added up before, and no residual is left."""
    scales = rows.abs().amax(1).div_(torch.tensor(127.0, device=rows.device))
    zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_channel(rows, scales, zeros, 0, torch.qint8)


def verify_quantize(pool: Pool, bits: int, chunk_size: int) -> None:
    """The same bytes and residuals."""
    ours, theirs = pool.apart(), pool.apart()
    payload = gck.quantize_ef_(ours.grad, ours.err, bits, chunk_size)
    _check_same(payload, torch_quantize_ef_(theirs, bits, chunk_size), (ours.err, theirs.err))


def verify_means(pool: Pool, chunk_size: int) -> None:
    """The same bytes and residuals."""
    ours, theirs = pool.apart(), pool.apart()
    payload = gck.quantize_ef_(ours.grad, ours.err, 2, chunk_size, scale="mean")
    _check_same(payload, torch_means_ef_(theirs, chunk_size), (ours.err, theirs.err))


def verify_stochastic(pool: Pool, bits: int, chunk_size: int) -> None:
    """The same scales; each element goes to a code next to it, and errors have no mean: of gck and of torch,
    whose random numbers, and so codes, are others."""
    ours, theirs = pool.apart(), pool.apart()
    acc = ours.grad32 + ours.err
    payload = gck.quantize_ef_(ours.grad, ours.err, bits, chunk_size, rounding="stochastic", seed=1)
    codes, scales = torch_quantize_ef_(theirs, bits, chunk_size, stochastic=True)
    step = spread(payload.scales, chunk_size, pool.n)
    same = torch.equal(payload.scales, scales)
    for packed, err in ((payload.codes, ours.err), (codes, theirs.err)):
        off = err / step
        same = same and torch.equal(acc - signed(unpack(packed, bits)[: pool.n], bits) * step, err)
        same = same and float(off.abs().max()) < 1 + 1e-4
        # Of an error of whole steps up or down, the standard deviation is half a step at most.
        same = same and abs(float(off.double().mean())) < STANDARD_ERRORS * 0.5 / pool.n**0.5
    _check(same, pool.n, payload)


def verify_quantize_per_channel(pool: Pool, chunk_size: int) -> None:
    """The codes of whole chunks, but for those in the middle of two."""
    ours = pool.apart()
    payload = gck.quantize_ef_(ours.grad, ours.err, 8, chunk_size)
    theirs = torch_quantize_per_channel(acc_of(pool.apart(), chunk_size)).int_repr().view(-1)
    differ = payload.codes.view(torch.int8)[: theirs.numel()].int() - theirs.int()
    same = int(differ.abs().max()) <= 1 and float(differ.abs().float().mean()) < MOST_MIDDLES
    _check(same, pool.n, payload)


def _check_same(payload: gck.Quantized, theirs: tuple[Tensor, Tensor], errs: tuple[Tensor, Tensor]) -> None:
    same = torch.equal(payload.codes, theirs[0]) and torch.equal(*errs)
    _check(same and torch.equal(payload.scales.view_as(theirs[1]), theirs[1]), payload.numel, payload)


def _check(same: bool, n: int, payload: gck.Quantized) -> None:
    if not same:
        raise PeerMismatchError(
            f"quantize_ef_: torch and gck disagree (n={n}, bits={payload.bits}, {payload.scale}, "
            f"chunk_size={payload.chunk_size})"
        )
