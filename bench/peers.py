"""What one would write without gck. Each peer computes the same function, and is held to it: a peer
whose result differs from that of gck is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import gck
from bench.measure import Buffers, Pool

try:
    import cupy
except ImportError:
    cupy = None
try:
    from pylibraft.common import DeviceResources
    from pylibraft.matrix import select_k
except ImportError:
    select_k = None

__all__ = [
    "Draw",
    "Pack",
    "PeerMismatchError",
    "cupy_topk_ef_",
    "have_cupy",
    "have_raft",
    "pack_with_cupy",
    "pack_with_numpy",
    "pack_with_torch",
    "places_of_strata",
    "raft_topk_ef_",
    "random_places",
    "sign_ef_peer_",
    "torch_chunk_topk",
    "torch_chunk_topk_ef_",
    "torch_random_k_ef_",
    "torch_topk",
    "torch_topk_ef_",
    "torch_topk_of_",
    "verify_chunk_topk",
    "verify_random_k",
    "verify_sign",
    "verify_topk",
    "verify_torch_chunk_topk",
    "verify_torch_topk",
]

# Means are summed in another order than by gck's halving tree.
SCALE_TOLERANCE = 1e-5


class PeerMismatchError(Exception):
    """A peer and gck disagree: one of them is wrong, and their times cannot be compared."""


def have_cupy() -> bool:
    return cupy is not None and cupy.cuda.is_available()


def have_raft() -> bool:
    return select_k is not None and torch.cuda.is_available()


def accumulate_(grad: Tensor, err: Tensor) -> Tensor:
    """err += grad by the fastest way that torch has: on CPUs it mixes dtypes far below memory speed."""
    return err.add_(grad if grad.is_cuda else grad.float())


def torch_topk_ef_(buffers: Buffers, k: int) -> tuple[Tensor, Tensor]:
    """Error-feedback top-k composed of torch operations. Indices in any order: it need not sort them."""
    return torch_topk_of_(buffers.grad, buffers.err, k)


def torch_topk_of_(grad: Tensor, err: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_(grad, err)
    indices = torch.topk(acc.abs(), k, sorted=False).indices
    values = acc[indices]
    acc[indices] = 0
    return values, indices


def torch_topk(magnitude: Tensor, k: int) -> Tensor:
    """The selection alone, on magnitudes made beforehand."""
    return torch.topk(magnitude, k, sorted=False).values


def torch_chunk_topk_ef_(
    buffers: Buffers, chunk_size: int, k: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Error-feedback top-k of every chunk composed of torch operations; the last chunk apart.

    Returns (values of value_dtype, positions in the vector), chunk by chunk, in any order inside one.
    """
    acc = accumulate_(buffers.grad, buffers.err)
    values, indices = [], []
    whole = acc.numel() // chunk_size * chunk_size
    for start, rows in ((0, acc[:whole].view(-1, chunk_size)), (whole, acc[whole:].view(1, -1))):
        if rows.numel():
            local = torch.topk(rows.abs(), min(k, rows.shape[1]), sorted=False).indices
            acc_there = rows.gather(1, local)
            values.append(acc_there.to(value_dtype))
            rows.scatter_(1, local, acc_there - values[-1].float())
            first = torch.arange(len(rows), device=acc.device)[:, None] * chunk_size + start
            indices.append((local + first).view(-1))
    return torch.cat([v.view(-1) for v in values]), torch.cat(indices)


def torch_chunk_topk(magnitude: Tensor, chunk_size: int, k: int) -> Tensor:
    """The selection alone, in whole chunks, on magnitudes made beforehand."""
    whole = magnitude.numel() // chunk_size * chunk_size
    return torch.topk(magnitude[:whole].view(-1, chunk_size), k, sorted=False).values


def cupy_topk_ef_(buffers: Buffers, k: int) -> tuple[Tensor, Tensor]:
    """The composition with CuPy's argpartition for the selection. CuPy and torch both work on the
    null stream here."""
    acc = accumulate_(buffers.grad, buffers.err)
    order = cupy.argpartition(cupy.from_dlpack(acc.abs()), acc.numel() - k)
    indices = from_dlpack(order[acc.numel() - k :])
    values = acc[indices]
    acc[indices] = 0
    return values, indices


def raft_topk_ef_(buffers: Buffers, k: int) -> tuple[Tensor, Tensor]:
    """The composition with RAFT's radix selection, on torch's stream."""
    acc = accumulate_(buffers.grad, buffers.err)
    found = torch.empty(1, k, dtype=torch.float32, device=acc.device)
    indices = torch.empty(1, k, dtype=torch.int64, device=acc.device)
    resources = DeviceResources(stream=torch.cuda.current_stream(acc.device).cuda_stream)
    select_k(acc.abs().unsqueeze(0), distances=found, indices=indices, select_min=False, handle=resources)
    values = acc[indices[0]]
    acc[indices[0]] = 0
    return values, indices[0]


# (n,) bool -> (ceil(n / 8),) uint8, little end first, on the same device.
Pack: TypeAlias = Callable[[Tensor], Tensor]


def sign_ef_peer_(buffers: Buffers, chunk_size: int, pack: Pack | None = None) -> tuple[Tensor, Tensor]:
    """Error-feedback sign composed of torch operations; bits packed by NumPy, on GPUs by torch, or by `pack`.

    Returns (uint8 bytes, little end first; scales).
    """
    acc = accumulate_(buffers.grad, buffers.err)
    n = acc.numel()
    whole = n // chunk_size * chunk_size
    positive = acc >= 0
    magnitude = acc.abs()
    scales = magnitude[:whole].view(-1, chunk_size).mean(1)
    if whole < n:
        scales = torch.cat([scales, magnitude[whole:].mean().view(1)])
    rows = acc[:whole].view(-1, chunk_size)
    scale = scales[: rows.shape[0], None]
    rows.sub_(torch.where(positive[:whole].view_as(rows), scale, -scale))
    if whole < n:
        acc[whole:].sub_(torch.where(positive[whole:], scales[-1], -scales[-1]))
    pack = pack or (pack_with_torch if positive.is_cuda else pack_with_numpy)
    return pack(positive), scales


def pack_with_numpy(positive: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(positive.numpy(), bitorder="little"))


def pack_with_cupy(positive: Tensor) -> Tensor:
    """CuPy and torch both work on the null stream here."""
    return from_dlpack(cupy.packbits(cupy.from_dlpack(positive.view(torch.uint8)), bitorder="little"))


def pack_with_torch(positive: Tensor) -> Tensor:
    """numpy.packbits(positive, bitorder="little") without leaving the device."""
    octets = torch.nn.functional.pad(positive, (0, -positive.numel() % 8)).view(-1, 8).to(torch.uint8)
    places = torch.arange(8, device=positive.device, dtype=torch.uint8)
    return (octets << places).sum(1, dtype=torch.uint8)


# (numel, k, device) -> (k,) int64 places, all different.
Draw: TypeAlias = Callable[[int, int, torch.device], Tensor]


def random_places(numel: int, k: int, device: torch.device) -> Tensor:
    """The first k of a permutation, ascending: what torch has for a choice without replacement."""
    return torch.randperm(numel, device=device)[:k].sort().values


def places_of_strata(numel: int, k: int, device: torch.device) -> Tensor:
    """One of each of k strata, as gck draws them, but for the turn of the ring: in as few operations as torch
    needs."""
    bounds = torch.arange(k + 1, device=device) * numel // k
    lengths = bounds[1:] - bounds[:-1]
    offsets = (torch.rand(k, device=device, dtype=torch.float64) * lengths).long()
    return bounds[:-1] + torch.minimum(offsets, lengths - 1)


def torch_random_k_ef_(buffers: Buffers, draw: Draw, k: int) -> tuple[Tensor, Tensor]:
    """Error-feedback random-k composed of torch operations: (values, places)."""
    acc = accumulate_(buffers.grad, buffers.err)
    places = draw(acc.numel(), k, acc.device)
    values = acc[places]
    acc[places] = 0
    return values, places


def verify_topk(peer: Any, pool: Pool, k: int) -> None:
    """Same values, indices and residual, but for the choice among equal magnitudes."""
    ours, theirs = pool.apart(), pool.apart()
    acc = ours.grad32 + ours.err
    payload = gck.topk_ef_(ours.grad, ours.err, k=k)
    values, indices = peer(theirs, k)
    order = indices.argsort()
    values, indices = values[order], indices[order]
    threshold = values.abs().min()
    differ = ours.err != theirs.err
    if (
        not torch.equal(payload.values.abs().sort().values, values.abs().sort().values)
        or not torch.equal(acc[indices], values)
        or not bool((acc[differ].abs() == threshold).all())
    ):
        raise PeerMismatchError(f"topk_ef_: {peer.__name__} and gck disagree (n={pool.n}, k={k})")


def verify_torch_topk(pool: Pool, k: int) -> None:
    ours = pool.apart()
    values = gck.topk_ef_(ours.grad, ours.err, k=k).values.abs()
    if not torch.equal(values.sort().values, torch_topk(pool.magnitude, k).sort().values):
        raise PeerMismatchError(f"topk_ef_: torch.topk and gck disagree (n={pool.n}, k={k})")


def verify_chunk_topk(pool: Pool, chunk_size: int, k: int, value_bits: int) -> None:
    """Same values, indices and residual, but for the choice among equal magnitudes."""
    ours, theirs = pool.apart(), pool.apart()
    acc = ours.grad32 + ours.err
    payload = gck.chunk_topk_ef_(ours.grad, ours.err, chunk_size, k, value_bits=value_bits)
    values, indices = torch_chunk_topk_ef_(theirs, chunk_size, k, payload.values.dtype)
    sent, dense = gck.decompress(payload), torch.zeros_like(acc)
    dense[indices] = values.float()
    pad = (0, -acc.numel() % chunk_size)
    ours_sorted, theirs_sorted = (
        torch.nn.functional.pad(x.abs(), pad).view(-1, chunk_size).sort(1).values for x in (sent, dense)
    )
    if (
        not torch.equal(ours_sorted, theirs_sorted)
        or not torch.equal(acc - sent, ours.err)
        or not torch.equal(acc - dense, theirs.err)
    ):
        raise PeerMismatchError(f"chunk_topk_ef_: torch and gck disagree (n={pool.n}, k={k})")


def verify_torch_chunk_topk(pool: Pool, chunk_size: int, k: int) -> None:
    ours = pool.apart()
    payload = gck.chunk_topk_ef_(ours.grad, ours.err, chunk_size, k, value_bits=32)
    theirs = torch_chunk_topk(pool.magnitude, chunk_size, k)
    values = payload.values[: len(theirs)].abs()
    if not torch.equal(values.sort(1).values, theirs.sort(1).values):
        raise PeerMismatchError(f"chunk_topk_ef_: torch.topk and gck disagree (n={pool.n}, k={k})")


def verify_sign(pool: Pool, chunk_size: int, pack: Pack | None = None) -> None:
    """Same bits; scales and residual within the tolerance of another order of summation."""
    ours, theirs = pool.apart(), pool.apart()
    payload = gck.sign_ef_(ours.grad, ours.err, chunk_size)
    packed, scales = sign_ef_peer_(theirs, chunk_size, pack)
    words = payload.words.view(torch.uint8)[: packed.numel()]
    largest = float(payload.scales.max())
    if (
        not torch.equal(words, packed)
        or not torch.allclose(payload.scales, scales, rtol=SCALE_TOLERANCE, atol=0)
        or not torch.allclose(ours.err, theirs.err, rtol=0, atol=SCALE_TOLERANCE * largest)
    ):
        raise PeerMismatchError(f"sign_ef_: peer and gck disagree (n={pool.n}, chunk_size={chunk_size})")


def verify_random_k(draw: Draw, pool: Pool, k: int) -> None:
    """k entries of acc each, wherever their places are; the rest in the residual."""
    ours, theirs = pool.apart(), pool.apart()
    acc = ours.grad32 + ours.err
    payload = gck.random_k_ef_(ours.grad, ours.err, k=k, seed=1)
    dense = gck.decompress(payload)
    values, places = torch_random_k_ef_(theirs, draw, k)
    for sent, at, left in (
        (payload.values, dense.nonzero()[:, 0], ours.err),
        (values, places, theirs.err),
    ):
        rest = acc.clone()
        rest[at] = 0
        right = torch.equal(acc[at], sent) and at.numel() == k and bool((at.diff() > 0).all())
        if not (right and torch.equal(left, rest)):
            raise PeerMismatchError(f"random_k_ef_: {draw.__name__} and gck disagree (n={pool.n}, k={k})")
