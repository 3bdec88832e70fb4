"""Peers of gck.quantize_ef_, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

import gck
from bench.codes import pack
from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError, accumulate_

__all__ = ["torch_quantize_ef_", "verify_quantize"]


def torch_quantize_ef_(buffers: Buffers, bits: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Error-feedback quantisation, to nearest by the largest magnitude, composed of torch operations.

    Returns (uint8 bytes, little end first; scales).
    """
    acc = accumulate_(buffers.grad, buffers.err)
    qmax = 2 ** (bits - 1) - 1
    packed, scales = [], []
    for rows in _chunks(acc, chunk_size):
        # By a number, torch would multiply by the reciprocal on CUDA, which rounds otherwise.
        scale = rows.abs().amax(1, keepdim=True).div_(torch.tensor(float(qmax), device=acc.device))
        codes = (rows * scale.reciprocal()).round_()
        rows.sub_(codes * scale)
        packed.append(pack(codes, bits))
        scales.append(scale.view(-1))
    return torch.cat(packed), torch.cat(scales)


def _chunks(acc: Tensor, chunk_size: int) -> list[Tensor]:
    """Views of whole chunks, and of what is left behind them."""
    whole = acc.numel() // chunk_size * chunk_size
    views = acc[:whole].view(-1, chunk_size), acc[whole:].view(1, -1)
    return [rows for rows in views if rows.numel()]


def verify_quantize(pool: Pool, bits: int, chunk_size: int) -> None:
    """The same bytes and residuals."""
    ours, theirs = pool.apart(), pool.apart()
    payload = gck.quantize_ef_(ours.grad, ours.err, bits, chunk_size)
    _check_same(payload, torch_quantize_ef_(theirs, bits, chunk_size), (ours.err, theirs.err))


def _check_same(payload: gck.Quantized, theirs: tuple[Tensor, Tensor], errs: tuple[Tensor, Tensor]) -> None:
    same = torch.equal(payload.codes, theirs[0]) and torch.equal(*errs)
    _check(same and torch.equal(payload.scales.view_as(theirs[1]), theirs[1]), payload.numel, payload)


def _check(same: bool, n: int, payload: gck.Quantized) -> None:
    if not same:
        raise PeerMismatchError(
            f"quantize_ef_: torch and gck disagree (n={n}, bits={payload.bits}, {payload.scale}, "
            f"chunk_size={payload.chunk_size})"
        )
