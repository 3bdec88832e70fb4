"""Payloads to dense vectors, and sums of payloads to payloads, as one would write it without gck: a few torch
operations each. What they return is what gck does, and they are held to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gck
from bench import peers
from bench.codes import of_levels, signed, spread, unpack
from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError, torch_chunk_topk_ef_
from bench.peers_quantize import torch_chunk_topk_means_ef_, torch_means_ef_, torch_quantize_ef_
from bench.places import places_of_codec, places_of_seed
from gck.coded_layout import RUN

__all__ = ["payload_of", "torch_decoded", "torch_reduced_", "verify_reduced"]

# A choice among equal magnitudes at the threshold of a chunk.
MOST_TIES = 1e-5  # of all elements


def torch_decoded(payload: Any) -> Tensor:
    """(numel,) fp32: what the payload decodes to."""
    decode: Callable[[Any], Tensor] = DECODERS[type(payload)]
    return decode(payload)


def _signs(payload: gck.PackedSigns) -> Tensor:
    octets = payload.words.view(torch.uint8)[: -(-payload.numel // 8)]
    positive = unpack(octets, 1)[: payload.numel] == 1
    scale = spread(payload.scales, payload.chunk_size, payload.numel)
    return torch.where(positive, scale, -scale)


def _quantized(payload: gck.Quantized) -> Tensor:
    codes = unpack(payload.codes, payload.bits)[: payload.numel]
    if payload.scale == "mean":
        levels = payload.scales.view(-1, 2)
        low, high = (spread(levels[:, i], payload.chunk_size, payload.numel) for i in (0, 1))
        return of_levels(codes, low, high)
    values = signed(codes, payload.bits)
    return values.mul_(spread(payload.scales, payload.chunk_size, payload.numel))


def _chunk_sparse(payload: gck.ChunkSparse) -> Tensor:
    chunks = -(-payload.numel // payload.chunk_size)
    dense = torch.zeros(chunks, payload.chunk_size, device=payload.values.device)
    bits = payload.value_bits
    if bits < 16:
        codes = unpack(payload.values.view(-1), bits).view(chunks, -1)[:, : payload.k]
    if bits == 2:
        levels = payload.scales.view(chunks, 2)
        values = of_levels(codes, levels[:, :1], levels[:, 1:])
    elif bits < 16:
        values = signed(codes, bits).mul_(payload.scales.view(chunks, 1))
    else:
        values = payload.values.view(chunks, payload.k).float()
    dense.scatter_(1, _positions(payload, chunks), values)
    return dense.view(-1)[: payload.numel]


def _sparse(payload: gck.SparseGrad) -> Tensor:
    dense = torch.zeros(payload.numel, device=payload.values.device)
    return dense.index_copy_(0, payload.indices.long(), payload.values.float())


def _coded_sparse(payload: gck.CodedSparse) -> Tensor:
    values = payload.values
    if payload.value_bits:
        codes = unpack(values, payload.value_bits)[: payload.k]
        values = signed(codes, payload.value_bits).mul_(spread(payload.scales, RUN, payload.k))
    dense = torch.zeros(payload.numel, device=values.device)
    return dense.index_copy_(0, places_of_codec(payload), values.float())


def _seeded_values(payload: gck.SeededValues) -> Tensor:
    values = payload.values
    places = places_of_seed(payload.seed, payload.numel, values.numel(), values.device)
    return torch.zeros(payload.numel, device=values.device).index_copy_(0, places, values.float())


def _factors(payload: gck.LowRankFactors) -> Tensor:
    rows = -(-payload.numel // payload.columns)
    dense = torch.zeros(rows, payload.columns, device=payload.left.device)
    for left, right in zip(payload.left, payload.right, strict=True):
        dense.add_(torch.outer(left, right))  # not a product of matrices, whose sums have another order
    return dense.view(-1)[: payload.numel]


DECODERS: dict[type, Callable[[Any], Tensor]] = {
    gck.PackedSigns: _signs,
    gck.Quantized: _quantized,
    gck.ChunkSparse: _chunk_sparse,
    gck.SparseGrad: _sparse,
    gck.CodedSparse: _coded_sparse,
    gck.SeededValues: _seeded_values,
    gck.LowRankFactors: _factors,
}


def torch_reduced_(payloads: list[Any], err: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """The mean of what payloads decode to, compressed again with the residual `err`, which is overwritten."""
    first = payloads[0]
    mean = torch_decoded(first)
    for payload in payloads[1:]:
        mean.add_(torch_decoded(payload))
    mean.div_(len(payloads))
    buffers = Buffers(pool, mean, mean, err)
    if isinstance(first, gck.PackedSigns):
        return peers.sign_ef_peer_(buffers, first.chunk_size)
    if isinstance(first, gck.Quantized):
        if first.scale == "mean":
            return torch_means_ef_(buffers, first.chunk_size)
        return torch_quantize_ef_(buffers, first.bits, first.chunk_size)
    if first.value_bits == 2:
        return torch_chunk_topk_means_ef_(buffers, first.chunk_size, first.k)
    return torch_chunk_topk_ef_(buffers, first.chunk_size, first.k, first.values.dtype)


def payload_of(compressor: Any, body: Tensor, n: int) -> Any:
    """The payload of a vector of n elements whose body this is."""
    if isinstance(compressor, gck.TopK):
        return compressor.payload(body, n)
    views = compressor.layout(n).views(body)
    if isinstance(compressor, gck.RandomK):
        return gck.SeededValues(*views, compressor.seed, n)
    if isinstance(compressor, gck.LowRank):
        rows, columns, rank = compressor.shape(n)
        return gck.LowRankFactors(views[0].view(rank, rows), views[1].view(rank, columns), n, columns)
    if isinstance(compressor, gck.Sign):
        return gck.PackedSigns(*views, n, compressor.chunk_size)
    if isinstance(compressor, gck.Quantize):
        return gck.Quantized(*views, n, compressor.chunk_size, compressor.bits, compressor.scale)
    return gck.ChunkSparse(*views, n, compressor.chunk_size, compressor.k, compressor.value_bits)


def verify_reduced(payload: Any, theirs: tuple[Tensor, Tensor], errs: tuple[Tensor, Tensor]) -> None:
    """Of a payload of gck: the same codes, and residuals that say the same.

    Signs' means are summed in another order; of chunk top-k, another of two equal magnitudes may be chosen.
    """
    if isinstance(payload, gck.ChunkSparse):
        same = float((errs[0] != errs[1]).float().mean()) < MOST_TIES
    elif isinstance(payload, gck.PackedSigns):
        largest = float(payload.scales.max())
        same = torch.equal(
            payload.words.view(torch.uint8)[: theirs[0].numel()], theirs[0]
        ) and torch.allclose(*errs, rtol=0, atol=peers.SCALE_TOLERANCE * largest)
    else:
        same = torch.equal(payload.codes, theirs[0]) and torch.equal(*errs)
    if not same:
        raise PeerMismatchError(
            f"reduce_: torch and gck disagree ({type(payload).__name__}, n={payload.numel})"
        )


def _positions(payload: gck.ChunkSparse, chunks: int) -> Tensor:
    """(chunks, k) int64: from two indices in three bytes, or from one in two."""
    if payload.indices.dtype != torch.uint8:
        return payload.indices.view(torch.int16).view(chunks, payload.k).long() & 0xFFFF
    three = payload.indices.view(chunks, -1, 3).long()
    low = three[:, :, 0] | (three[:, :, 1] & 15) << 8
    high = three[:, :, 1] >> 4 | three[:, :, 2] << 4
    return torch.stack([low, high], 2).view(chunks, -1)[:, : payload.k]
