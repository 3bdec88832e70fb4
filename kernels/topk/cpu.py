"""The CPU twin of top-k: hands addresses to the compiled kernels (bindings/cpu/topk.cpp, sparse.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gck._native import load, num_threads
from gck.errors import CorruptPayloadError
from gck.kernels.common.native import DTYPE_CODE, addresses, offsets, residual_options
from gck.kernels.topk import coded

if TYPE_CHECKING:
    from gck.kernels.topk import TopK
    from gck.kernels.topk.lists import Bodies
    from gck.wire import Layout


def direct(compressor: TopK, numel: int) -> Any:
    """See `gck.ops.direct`."""
    layout = compressor.layout(numel)
    return load().direct_topk(numel, layout.native(), DTYPE_CODE[compressor.value_dtype])


def compress_(
    compressor: TopK,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    hint: Tensor | None = None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    if not compressor.is_plain:
        options = {"hint": hint, "clip": clip, "stats": stats}
        coded.compress_(compress_, compressor, grad, err, bodies, nonfinite, **options)
        return
    cleared = load().topk_compress(
        *_job(compressor.layout(grad.numel()), grad, err, bodies),
        0 if hint is None else hint.data_ptr(),
        num_threads(),
        residual_options(compressor.decay, clip, stats),
    )
    if nonfinite is not None:
        nonfinite += cleared


def preview_(compressor: TopK, grad: Tensor, err: Tensor, bodies: Tensor) -> bool:
    """See `gck.compressor.preview_`."""
    if not compressor.is_plain:
        return coded.preview_(preview_, compressor, grad, err, bodies)
    job = _job(compressor.layout(grad.numel()), grad, err, bodies)
    done: bool = load().topk_preview(*job, num_threads())
    return done


def _job(
    layout: Layout, grad: Tensor, err: Tensor, body: Tensor
) -> tuple[int, int, int, int, int, int, int, int, bool]:
    """What the kernel is told of one vector and its payload."""
    values, indices = layout.fields
    start = body.data_ptr()
    return (
        grad.data_ptr(),
        DTYPE_CODE[grad.dtype],
        err.data_ptr(),
        grad.numel(),
        values.count,
        start,
        DTYPE_CODE[values.dtype],
        start + indices.offset,
        indices.dtype == torch.int64,
    )


def compress_flat_(
    compressor: TopK,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
) -> None:
    """Selects from all tensors together; indices are those of their concatenation."""
    numel = sum(grad.numel() for grad in grads)
    values, indices = compressor.layout(numel).fields
    body = bodies.data_ptr()
    cleared = load().topk_compress_flat(
        _runs(grads, errs),
        values.count,
        body,
        DTYPE_CODE[values.dtype],
        body + indices.offset,
        indices.dtype == torch.int64,
        num_threads(),
        residual_options(compressor.decay, clip, None),
    )
    if nonfinite is not None:
        nonfinite += cleared


def compress_list_(
    bodies: Bodies,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    memory: Tensor,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
) -> None:
    """Selects from each tensor by itself."""
    base = memory.data_ptr()
    places = []
    for start, layout in zip(bodies.starts, bodies.layouts, strict=True):
        values, indices = layout.fields
        at = base + start
        places.append((values.count, at, at + indices.offset, indices.dtype == torch.int64))
    options = residual_options(decay, clip, None)
    cleared = load().topk_compress_each(
        _runs(grads, errs), places, DTYPE_CODE[bodies.value_dtype], num_threads(), options
    )
    if nonfinite is not None:
        nonfinite += cleared


def _runs(grads: Sequence[Tensor], errs: Sequence[Tensor]) -> list[tuple[int, int, int, int]]:
    return [
        (grad.data_ptr(), DTYPE_CODE[grad.dtype], err.data_ptr(), grad.numel())
        for grad, err in zip(grads, errs, strict=True)
    ]


def decompress_(
    compressor: TopK, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    if not compressor.is_plain:
        coded.decompress_(decompress_, compressor, out, fields, alpha, accumulate)
        return
    values, indices = fields
    _, bad = load().sparse_decompress(
        [values.data_ptr()],
        values.numel(),
        DTYPE_CODE[values.dtype],
        *offsets(fields),
        indices.dtype == torch.int64,
        out.data_ptr(),
        out.numel(),
        alpha,
        not accumulate,
        accumulate,
        num_threads(),
        1.0,
    )
    if bad >= 0:
        raise _corrupt("", out, bad, indices)


def decompress_sum_(
    compressor: TopK,
    out: Tensor,
    bodies: Tensor,
    layout: Layout,
    alpha: float,
    accumulate: bool,
    divisor: int = 1,
) -> None:
    """out (+)= alpha * decoded, for each row of bodies (W, layout.nbytes) in turn; then out /= divisor, which
    is 1 where `accumulate`."""
    if not compressor.is_plain:
        plain = partial(decompress_sum_, divisor=divisor)
        coded.decompress_sum_(plain, compressor, out, bodies, layout, alpha, accumulate)
        return
    values, indices = layout.fields
    row, bad = load().sparse_decompress(
        addresses(bodies),
        values.count,
        DTYPE_CODE[values.dtype],
        indices.offset,
        indices.dtype == torch.int64,
        out.data_ptr(),
        out.numel(),
        alpha,
        not accumulate,
        True,
        num_threads(),
        divisor,
    )
    if bad >= 0:
        raise _corrupt(f"payload {row}: ", out, bad, layout.views(bodies[row])[1])


decompress_mean_ = decompress_sum_


def _corrupt(which: str, out: Tensor, position: int, indices: Tensor) -> CorruptPayloadError:
    return CorruptPayloadError(
        f"{which}indices must ascend within [0, {out.numel()}), got {int(indices[position])} "
        f"at position {position}"
    )
