"""The CPU twin of sign: hands addresses to the compiled kernel (bindings/cpu/sign.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gck._native import load, num_threads
from gck.compressor import shard_numel
from gck.kernels.common.native import DTYPE_CODE, residual_options

if TYPE_CHECKING:
    from gck.kernels.sign import Sign


def compress_(
    compressor: Sign,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    chunk_size = compressor.chunk_size
    shard = shard_numel(grad.numel(), chunk_size, bodies.shape[0])
    cleared = load().sign_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        chunk_size,
        bodies.data_ptr(),
        bodies.stride(0),
        -(-shard // chunk_size),
        compressor.layout(shard).fields[1].offset,
        num_threads(),
        residual_options(compressor, clip, stats),
    )
    if nonfinite is not None:
        nonfinite += cleared


def decompress_(
    compressor: Sign, out: Tensor, fields: tuple[Tensor, Tensor], alpha: float, accumulate: bool
) -> None:
    words, scales = fields
    load().sign_decompress(
        words.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        out.numel(),
        compressor.chunk_size,
        alpha,
        accumulate,
        num_threads(),
    )
