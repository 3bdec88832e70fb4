"""Messages written from docs/wire-format.md alone, sharing no code with gck."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

FLOATS = {torch.float32: (1, 32), torch.bfloat16: (2, 16), torch.float16: (3, 16)}
INDICES = {torch.int32: 1, torch.int64: 2, torch.uint16: 3, torch.uint8: 4}


def raw(field: Tensor) -> bytes:
    data = bytes(field.contiguous().view(-1).view(torch.uint8).tolist())
    return data + bytes(-len(data) % 16)


def header(payload: Any) -> dict[str, int]:
    """Fields that are not 0."""
    match type(payload).__name__:
        case "SparseGrad":
            dtype, bits = FLOATS[payload.values.dtype]
            codec = INDICES[payload.indices.dtype]
            return {"id": 1, "dtype": dtype, "codec": codec, "bits": bits, "k": len(payload.values)}
        case "PackedSigns":
            return {"id": 2, "bits": 1, "chunk": payload.chunk_size}
        case "ChunkSparse":
            dtype = {32: 1, 16: 2, 8: 0, 4: 0, 2: 0}[payload.value_bits]
            codec = INDICES[payload.indices.dtype]
            fields = {"id": 3, "dtype": dtype, "codec": codec, "bits": payload.value_bits}
            return fields | {"chunk": payload.chunk_size, "k": payload.k}
        case "Quantized":
            flags = 2 if payload.scale == "mean" else 0
            return {"id": 4, "bits": payload.bits, "flags": flags, "chunk": payload.chunk_size}
        case "SeededValues":
            dtype, bits = FLOATS[payload.values.dtype]
            k, seed = len(payload.values), payload.seed
            return {"id": 5, "dtype": dtype, "bits": bits, "k": k, "seed": seed}
        case "LowRankFactors":
            return {"id": 7, "dtype": 1, "bits": 32, "chunk": payload.columns, "k": len(payload.left)}
        case "CodedSparse":
            dtype, bits = (0, payload.value_bits) if payload.value_bits else FLOATS[payload.values.dtype]
            wide = 2 if payload.numel >= 2**31 else 1
            codec = {"int32": wide, "block16": 5, "elias_fano": 6}[payload.index_codec]
            return {"id": 6, "dtype": dtype, "codec": codec, "bits": bits, "k": payload.k}
    raise AssertionError(payload)


def message(payload: Any, checksum: bool) -> bytes:
    h = {"dtype": 0, "codec": 0, "flags": 0, "chunk": 0, "k": 0, "seed": 0} | header(payload)
    body = b"".join(raw(field) for field in payload if isinstance(field, Tensor))
    start = struct.pack("<4s6B", b"GCKM", 1, h["id"], h["dtype"], h["codec"], h["bits"], 0)
    start += struct.pack("<HIQ", h["flags"] | checksum, h["chunk"], payload.numel)
    start += struct.pack("<QqQ8x", h["k"], h["seed"], len(body))
    if not checksum:
        return start + bytes(8) + body
    import xxhash  # which a machine that only runs GPU tests may lack

    digest = xxhash.xxh3_64_intdigest(start + bytes(8) + body)
    return start + struct.pack("<Q", digest) + body
