"""The CPU twin of top-k: hands addresses to the compiled kernels (bindings/cpu/topk.cpp, sparse.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.errors import CorruptPayloadError
from gck.kernels.common.native import DTYPE_CODE

if TYPE_CHECKING:
    from gck.kernels.topk import TopK


def compress_(
    compressor: TopK,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
) -> None:
    values, indices = compressor.layout(grad.numel()).views(bodies[0])
    cleared = load().topk_compress(
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        values.numel(),
        values.data_ptr(),
        DTYPE_CODE[values.dtype],
        indices.data_ptr(),
        indices.dtype == torch.int64,
        0 if hint is None else hint.data_ptr(),
        num_threads(),
    )
    if nonfinite is not None:
        nonfinite += cleared


def decompress_(
    compressor: TopK, out: Tensor, fields: tuple[Tensor, Tensor], alpha: float, accumulate: bool
) -> None:
    values, indices = fields
    _, bad = load().sparse_decompress(
        values.data_ptr(),
        1,
        0,
        values.numel(),
        DTYPE_CODE[values.dtype],
        indices.data_ptr() - values.data_ptr(),
        indices.dtype == torch.int64,
        out.data_ptr(),
        out.numel(),
        alpha,
        accumulate,
        num_threads(),
    )
    if bad >= 0:
        raise CorruptPayloadError(
            f"decompress: indices must ascend within [0, {out.numel()}), got {int(indices[bad])} "
            f"at position {bad}"
        )
