"""One payload of every kind and option, small, from inputs that are the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gck

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def vector(n: int, *nonfinite: float) -> Tensor:
    """Fractions of 4096 in [-8, 8), all exact; the first ones may be replaced."""
    x = ((torch.arange(n) * 40503 + 12345) % 65536 - 32768).float() / 4096
    x[: len(nonfinite)] = torch.tensor(nonfinite)
    return x


def sparse(values: list[float], indices: list[int], numel: int) -> gck.SparseGrad:
    return gck.SparseGrad(torch.tensor(values), torch.tensor(indices), numel)


def sign(n: int, chunk_size: int, *nonfinite: float) -> gck.PackedSigns:
    return gck.sign_ef_(vector(n, *nonfinite), torch.zeros(n), chunk_size=chunk_size)


# name -> payload, and whether its message has a checksum
CASES: dict[str, tuple[Callable[[], gck.Payload], bool]] = {
    **{
        f"topk_{name}": (lambda dtype=dtype: gck.topk(vector(200), 0.1, value_dtype=dtype), True)
        for name, dtype in DTYPES.items()
    },
    "topk_nonfinite": (lambda: gck.topk(vector(100, math.nan, math.inf, -math.inf), k=5), True),
    "topk_without_checksum": (lambda: gck.topk(vector(100), k=7), False),
    "topk_int64": (lambda: sparse([1.5, -2.0, 0.25], [0, 5, 2**40], 2**40 + 1), True),
    "topk_of_nothing": (lambda: gck.topk(vector(0), 0.1), True),
    "sign_32": (lambda: sign(131, 32), True),
    "sign_256": (lambda: sign(300, 256), True),
    "sign_nonfinite": (lambda: sign(100, 32, math.nan, *([1.0] * 40), math.inf), False),
    **{
        f"chunk_topk_{bits}_bits": (
            lambda bits=bits: gck.chunk_topk(vector(290), chunk_size=64, k=5, value_bits=bits),
            True,
        )
        for bits in (32, 16, 8, 4, 2)
    },
    # 261 elements: a last chunk of 5, which has fewer than 9 entries to keep
    **{
        f"chunk_topk_{bits}_bits_12_bit_indices": (
            lambda bits=bits: chunk_topk_12(vector(261), bits),
            bits != 4,
        )
        for bits in (32, 16, 8, 4, 2)
    },
    "chunk_topk_short_end": (lambda: gck.chunk_topk(vector(258), chunk_size=128, k=9, value_bits=4), True),
    **{
        f"quantize_{bits}_bits": (lambda bits=bits: gck.quantize(vector(201), bits=bits), True)
        for bits in (8, 4, 2)
    },
    "quantize_mean": (lambda: gck.quantize(vector(201), bits=2, chunk_size=64, scale="mean"), True),
    "quantize_nonfinite": (lambda: gck.quantize(vector(77, math.inf), bits=4, chunk_size=32), False),
    **{
        f"random_k_{name}": (
            lambda dtype=dtype: gck.random_k(vector(200), k=13, seed=-(2**40), value_dtype=dtype),
            True,
        )
        for name, dtype in DTYPES.items()
    },
    **{
        f"coded_{codec}_{name}": (
            lambda codec=codec, dtype=dtype, bits=bits: coded(vector(200), 21, codec, dtype, bits),
            (codec, name) != ("block16", "fp32"),
        )
        for codec in ("int32", "block16", "elias_fano")
        for name, dtype, bits in (
            *((name, dtype, None) for name, dtype in DTYPES.items()),
            ("8_bits", torch.float32, 8),
            ("4_bits", torch.float32, 4),
        )
    },
    # No lower bits at all, and a second scale, of 3 entries
    "coded_half_of_all": (lambda: coded(vector(1000), 515, "elias_fano", torch.float32, 4), True),
    "coded_nonfinite": (lambda: coded(vector(99, math.inf), 9, "elias_fano", torch.float32, 8), True),
    "coded_of_nothing": (lambda: coded(vector(0), 1, "elias_fano", torch.float32, 8), True),
    # The first block ends with an entry, the second one has none
    "coded_block16_of_four_blocks": (
        lambda: gck.encode_indices(
            sparse32([1.5, -2.0, 0.25, 3.0, 7.0], [5, 65535, 131072, 140000, 199999], 200000), "block16"
        ),
        True,
    ),
    # 31 rows of 20, the last one of 7; the columns that compressors choose; a vector of one element
    "low_rank": (lambda: gck.low_rank(vector(607), 3, columns=20, seed=-(2**40)), True),
    "low_rank_of_a_vector": (lambda: gck.low_rank(vector(100), seed=5), False),
    "low_rank_nonfinite": (lambda: gck.low_rank(vector(60, math.inf), 2, columns=8, seed=1), True),
    "low_rank_of_one": (lambda: gck.low_rank(vector(1), seed=5), True),
    "low_rank_of_nothing": (lambda: gck.low_rank(vector(0), seed=5), True),
    "coded_int32_int64": (lambda: long_coded("int32"), True),
    "coded_elias_fano_int64": (lambda: long_coded("elias_fano"), True),
}


def sparse32(values: list[float], indices: list[int], numel: int) -> gck.SparseGrad:
    return gck.SparseGrad(torch.tensor(values), torch.tensor(indices, dtype=torch.int32), numel)


def coded(x: Tensor, k: int, codec: str, dtype: torch.dtype, value_bits: int | None) -> gck.CodedSparse:
    """Top-k of x as compressors alone make it."""
    compressor = gck.TopK(k=k, value_dtype=dtype, index_codec=codec, value_bits=value_bits)
    body = torch.zeros(1, compressor.layout(x.numel()).nbytes, dtype=torch.uint8)
    compressor.compress_(x, None, body)
    payload = compressor.payload(body[0], x.numel())
    return as_coded(payload) if isinstance(payload, gck.SparseGrad) else payload


def long_coded(codec: str) -> gck.CodedSparse:
    """Five of 2**40 + 1 elements."""
    payload = sparse([1.5, -2.0, 0.25, 3.0, 7.0], [0, 5, 2**33, 2**33 + 1, 2**40], 2**40 + 1)
    return as_coded(payload) if codec == "int32" else gck.encode_indices(payload, codec)


def as_coded(payload: gck.SparseGrad) -> gck.CodedSparse:
    """With the codec that leaves indices as they are, which nobody needs."""
    none = torch.empty(0)
    values, indices, numel = payload
    return gck.CodedSparse(values, none, indices, none.to(torch.uint8), numel, len(values), "int32")


def chunk_topk_12(x: Tensor, value_bits: int) -> gck.ChunkSparse:
    """`gck.chunk_topk` with indices of 12 bits, which compressors alone make."""
    compressor = gck.ChunkTopK(9, 128, value_bits, index_bits=12)
    body = torch.zeros(1, compressor.layout(x.numel()).nbytes, dtype=torch.uint8)
    compressor.compress_(x, None, body)
    fields = compressor.layout(x.numel()).views(body[0])
    values, scales, indices = (field.view(compressor.chunks(x.numel()), -1) for field in fields)
    return gck.ChunkSparse(values, scales, indices, x.numel(), 128, 9, value_bits)


def message(name: str) -> bytes:
    make, checksum = CASES[name]
    return gck.to_bytes(make(), checksum=checksum)


def dense(name: str) -> bytes:
    """What the case decodes to, as little-endian fp32; every NaN the same. Of 2**40 elements, the entries."""
    payload = CASES[name][0]()
    out = payload.values if payload.numel > 1000 else gck.decompress(payload)
    out = torch.where(out.isnan(), math.nan, out.float())
    return bytes(out.view(torch.uint8).tolist())
