"""The oracle of index codecs: slow, obvious, plain torch and Python's own integers."""

from __future__ import annotations

import torch
from torch import Tensor

from gck.errors import CorruptPayloadError


def encode(codec: str, indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The two fields of (k,) strictly ascending indices within [0, numel)."""
    k = indices.numel()
    if codec == "int32":
        return indices.clone(), torch.empty(0, dtype=torch.uint8)
    if codec == "block16":
        blocks = -(-numel // 65536) if k else 0
        stops = torch.arange(1, blocks + 1) * 65536
        ends = torch.searchsorted(indices.long(), stops)
        return (indices.long() % 65536).to(torch.uint16), ends.to(indices.dtype)
    if not k:
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    bits = (numel // k).bit_length() - 1
    low = (indices.long()[:, None] >> torch.arange(bits)) & 1
    high = torch.zeros(k + (numel >> bits) + 1, dtype=torch.int64)
    high[(indices.long() >> bits) + torch.arange(k)] = 1
    return _bytes(low.reshape(-1)), _bytes(high)


def decode(codec: str, fields: tuple[Tensor, ...], numel: int, k: int) -> Tensor:
    """The (k,) indices of such fields.

    Raises:
        CorruptPayloadError: no k strictly ascending indices within [0, numel) have these fields.
    """
    dtype = torch.int32 if numel <= 2**31 - 1 else torch.int64
    if codec == "int32":
        indices = fields[0].long()
    elif codec == "block16":
        ends = [0, *fields[1].tolist()]
        if sorted(ends) != ends or ends[-1] != k:
            raise CorruptPayloadError(f"ends of blocks must ascend from 0 to {k}, got {ends}")
        counts = torch.tensor(ends).diff()
        indices = torch.arange(len(counts)).repeat_interleave(counts) * 65536 + fields[0].long()
    elif k:
        bits = (numel // k).bit_length() - 1
        low, high = _bits(fields[0]), _bits(fields[1])
        if low[k * bits :].any() or high[k + (numel >> bits) + 1 :].any():
            raise CorruptPayloadError("padding must be zero")
        places = high.nonzero().flatten()
        if len(places) != k:
            raise CorruptPayloadError(f"{len(places)} indices where there must be {k}")
        lower = (low[: k * bits].view(k, bits) << torch.arange(bits)).sum(1)
        indices = ((places - torch.arange(k)) << bits) + lower
    else:
        indices = torch.empty(0, dtype=torch.int64)
    if k and not (indices[0] >= 0 and (indices.diff() > 0).all() and indices[-1] < numel):
        raise CorruptPayloadError(f"indices must ascend within [0, {numel})")
    return indices.to(dtype)


def _bytes(bits: Tensor) -> Tensor:
    """Zeros and ones as bytes, little end first, zeros up to a multiple of 8 bytes."""
    words = torch.zeros(-(-len(bits) // 64) * 64, dtype=torch.int64)
    words[: len(bits)] = bits
    return (words.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def _bits(octets: Tensor) -> Tensor:
    return (octets.long()[:, None] >> torch.arange(8) & 1).view(-1)
