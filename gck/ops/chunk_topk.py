"""Top-k of every chunk, with and without error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gck import interop
from gck.kernels.chunk_topk import ChunkTopK, check_options
from gck.kernels.common import checks
from gck.ops import direct
from gck.ops.registration import Array, compress, fake_body, plain, register
from gck.payload import ChunkSparse
from gck.statistics import Statistics
from gck.values import plain_int

__all__ = ["chunk_topk", "chunk_topk_ef_"]

# In memory an index is a number of torch's; compressors on collectives pack them closer.
INDEX_BITS = 16


def chunk_topk_ef_(
    grad: Array,
    err: Array,
    chunk_size: int = 4096,
    k: int = 64,
    *,
    value_bits: int = 16,
    nonfinite: Tensor | None = None,
    decay: float = 1.0,
    clip: float | Tensor | None = None,
    stats: Statistics | None = None,
) -> ChunkSparse:
    """Selects the k largest entries of every chunk of acc = grad + err; the rest stays in err.

    Exactly k entries a chunk by magnitude (NaN > Inf > finite), the lowest index wins a tie, indices
    ascend. A last chunk of fewer than k elements is kept whole. Deterministic; no host synchronisation on
    CUDA. Runs on torch's current stream.

    Args:
        grad: fp32, bf16 or fp16, contiguous, any shape, CPU or CUDA; read only.
        err: the residual: fp32, contiguous, same numel and device; becomes acc - decompress(result).
            Entries that would not be finite become 0: what is not finite travels and never stays.
        chunk_size: elements of a chunk of the flattened gradient, a power of two in [32, 65536].
        k: entries kept of a chunk, in [1, chunk_size / 2].
        value_bits: of a value that travels; what it loses stays in err. 32: fp32. 16: bf16, to nearest
            even. 8 and 4: a multiple of max / 127 or max / 7 of the chunk's selected entries. 2: its sign
            and one of two levels, the means of the magnitudes above and below the mean.
        nonfinite: (1,) int64 on the same device; increased by the number of residuals cleared.
        decay: acc = fp32(grad) + clamp(decay * err, -clip, clip): the residual is multiplied by it as it is
            read; in (0, 1] as fp32 rounds it. What travels is what would if each call ended with
            err = clamp(decay * (acc - decoded), -clip, clip).
        clip: bound of what is added to the gradient: a number above 0, or a one-element fp32 tensor on the
            same device, which nobody waits for, and which counts as 0 where it is not above 0. None: no
            bound. A NaN in err stays NaN.
        stats: a `gck.Statistics` on the same device, overwritten.

    Returns:
        ChunkSparse(values, scales, indices (chunks, k) uint16, numel, chunk_size, k, value_bits).

    Raises:
        ArgumentError, DtypeError, ShapeMismatchError, DeviceMismatchError, LayoutError (not contiguous,
        overlapping), AutogradError; before anything is written.

    Source: Wang et al., "Communication Efficient LLM Pre-training with SparseLoCo" (2025), section 3.
    """
    plainly = nonfinite is None and clip is None and stats is None
    if plainly and type(decay) is float and decay == 1 and not is_dynamo_compiling():
        payload: ChunkSparse | None = direct.maker(ChunkTopK)(
            0, grad, err, k, chunk_size, value_bits, INDEX_BITS
        )
        if payload is not None:
            return payload
    if not (isinstance(grad, Tensor) and isinstance(err, Tensor)):
        with interop.borrowed("chunk_topk_ef_", ("err",), grad=grad, err=err) as (g, e):
            named: Any = {"nonfinite": nonfinite, "decay": decay, "clip": clip, "stats": stats}
            return chunk_topk_ef_(g, e, chunk_size, k, value_bits=value_bits, **named)
    k, chunk_size, value_bits = plain_int(k), plain_int(chunk_size), plain_int(value_bits)
    check_options("chunk_topk_ef_", k, chunk_size, value_bits)
    beta, limit, values = checks.residual_options("chunk_topk_ef_", grad, decay, clip, stats)
    compressor = _compressor(chunk_size, k, value_bits, beta)
    compressor.check_inputs("chunk_topk_ef_", grad, err, nonfinite)
    if plain(grad, err, nonfinite, limit, values):
        body = compress("chunk_topk_ef_", compressor, grad, err, nonfinite, limit, stats=values)
    else:
        options = (chunk_size, k, value_bits, nonfinite, beta, limit, values)
        body = torch.ops.gck.chunk_topk_ef_(grad, err, *options)
    return _payload(compressor, body, grad.numel())


def chunk_topk(x: Array, chunk_size: int = 4096, k: int = 64, *, value_bits: int = 16) -> ChunkSparse:
    """The k largest entries of every chunk of x, without error feedback; x is read only.

    Arguments, result and errors as for `chunk_topk_ef_`.
    """
    if not isinstance(x, Tensor):
        with interop.borrowed("chunk_topk", (), x=x) as (tensor,):
            return chunk_topk(tensor, chunk_size, k, value_bits=value_bits)
    k, chunk_size, value_bits = plain_int(k), plain_int(chunk_size), plain_int(value_bits)
    check_options("chunk_topk", k, chunk_size, value_bits)
    checks.check_grad("chunk_topk", x, "x")
    call = _chunk_topk if plain(x) else torch.ops.gck.chunk_topk
    body = call(x, chunk_size, k, value_bits)
    return _payload(_compressor(chunk_size, k, value_bits), body, x.numel())


def _compressor(chunk_size: int, k: int, value_bits: int, decay: float = 1.0) -> ChunkTopK:
    return ChunkTopK(k, chunk_size, value_bits, INDEX_BITS, decay=decay)


def _payload(compressor: ChunkTopK, body: Tensor, numel: int) -> ChunkSparse:
    chunks = compressor.chunks(numel)
    values, scales, indices = (
        view.view(chunks, count)
        for view, count in zip(compressor.layout(numel).views(body), compressor.row, strict=True)
    )
    return ChunkSparse(
        values, scales, indices, numel, compressor.chunk_size, compressor.k, compressor.value_bits
    )


def _chunk_topk_ef(
    grad: Tensor,
    err: Tensor,
    chunk_size: int,
    k: int,
    value_bits: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    compressor = _compressor(chunk_size, k, value_bits, decay)
    return compress("chunk_topk_ef_", compressor, grad, err, nonfinite, clip, stats=stats)


def _chunk_topk(x: Tensor, chunk_size: int, k: int, value_bits: int) -> Tensor:
    return compress("chunk_topk", _compressor(chunk_size, k, value_bits), x, None, None)


def _fake_chunk_topk_ef(
    grad: Tensor,
    err: Tensor,
    chunk_size: int,
    k: int,
    value_bits: int,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    return fake_body(_compressor(chunk_size, k, value_bits), grad)


def _fake_chunk_topk(x: Tensor, chunk_size: int, k: int, value_bits: int) -> Tensor:
    return fake_body(_compressor(chunk_size, k, value_bits), x)


register(
    "chunk_topk_ef_(Tensor grad, Tensor(a!) err, int chunk_size, int k, int value_bits,"
    " Tensor(b!)? nonfinite, float decay=1.0, Tensor? clip=None, Tensor(c!)? stats=None) -> Tensor",
    _chunk_topk_ef,
    _fake_chunk_topk_ef,
)
register(
    "chunk_topk(Tensor x, int chunk_size, int k, int value_bits) -> Tensor", _chunk_topk, _fake_chunk_topk
)
