"""Top-k in few bytes, on any device: indices by a codec, and values as codes of 8 or 4 bits.

Entries are selected by the kernels of plain top-k. Codes are those of `gck.Quantize` with one scale for each
`gck.coded_layout.RUN` entries, in order of index; what they lose goes back to the residual. A payload is
decoded to a plain one first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gck.errors import ArgumentError
from gck.kernels import index_codecs
from gck.kernels.common.base import backend
from gck.kernels.quantize import Quantize
from gck.wire import Layout

if TYPE_CHECKING:
    from gck.kernels.topk import TopK

__all__ = ["compress_", "decompress_", "decompress_sum_", "preview_"]

FUNCTION = "TopK"


def compress_(
    kernel: Callable[..., None],
    compressor: TopK,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    **options: Tensor | None,
) -> None:
    """See `kernels.common.base`; `kernel` is `compress_` of plain top-k."""
    if compressor.codes is not None and options.get("stats") is not None:
        raise ArgumentError(f"{FUNCTION}: no statistics are taken of values of {compressor.value_bits} bits")
    selected = compressor.plain.layout(grad.numel()).empty_body(grad.device)
    kernel(compressor.plain, grad, err, selected, nonfinite, **options)
    indices, left = _encode(compressor, selected, grad.numel(), bodies.view(-1), nonfinite)
    if left is not None:
        err.scatter_(0, indices.long(), left)


def preview_(
    kernel: Callable[..., bool], compressor: TopK, grad: Tensor, err: Tensor, bodies: Tensor
) -> bool:
    """See `gck.compressor.preview_`; `kernel` is `preview_` of plain top-k."""
    selected = compressor.plain.layout(grad.numel()).empty_body(grad.device)
    if not kernel(compressor.plain, grad, err, selected):
        return False
    _encode(compressor, selected, grad.numel(), bodies.view(-1), None)
    return True


def _encode(
    compressor: TopK, selected: Tensor, numel: int, body: Tensor, nonfinite: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fills the body with what was selected; returns where, and what codes have lost of it."""
    values, indices = compressor.plain.layout(numel).views(selected)
    sent, _, *encoded = compressor.layout(numel).views(body)
    left = None
    if compressor.codes is None:
        sent.copy_(values)
    else:
        left = _quantize(compressor.codes, values, body, nonfinite)
    index_codecs.encode_(compressor.index_codec, indices, numel, encoded, FUNCTION)
    return indices, left


def _quantize(codes: Quantize, values: Tensor, body: Tensor, nonfinite: Tensor | None) -> Tensor:
    """Codes and scales of what was selected, at the start of `body`; returns what they lose."""
    # Of what was selected nothing is left yet: -0 is nothing to add to a value, whatever its sign.
    left = torch.full_like(values, -0.0)
    bodies = body[: codes.layout(values.numel()).nbytes].unsqueeze(0)
    backend(FUNCTION, codes.package, values.device).compress_(codes, values, left, bodies, nonfinite)
    if nonfinite is not None:
        # Selected entries that are not finite were counted before: selecting them cleared them, too.
        nonfinite -= values.isfinite().logical_not_().sum()
    return left


def decompress_(
    kernel: Callable[..., None],
    compressor: TopK,
    out: Tensor,
    fields: Sequence[Tensor],
    alpha: float,
    accumulate: bool,
) -> None:
    """See `kernels.common.base`; `kernel` is `decompress_` of plain top-k."""
    layout = compressor.plain.layout(out.numel())
    bodies = _plain_bodies(compressor, layout, [field.view(1, -1) for field in fields], out)
    kernel(compressor.plain, out, layout.views(bodies[0]), alpha, accumulate)


def decompress_sum_(
    kernel: Callable[..., None],
    compressor: TopK,
    out: Tensor,
    bodies: Tensor,
    layout: Layout,
    alpha: float,
    accumulate: bool,
) -> None:
    """See `kernels.common.base`; `kernel` is `decompress_sum_` of plain top-k."""
    plain = compressor.plain.layout(out.numel())
    decoded = _plain_bodies(compressor, plain, _rows(bodies, layout), out)
    kernel(compressor.plain, out, decoded, plain, alpha, accumulate)


def _rows(bodies: Tensor, layout: Layout) -> list[Tensor]:
    """(W, count) of each field."""
    return [
        bodies[:, f.offset : f.end].view(f.dtype)
        if f.count
        else bodies.new_empty(len(bodies), 0, dtype=f.dtype)
        for f in layout.fields
    ]


def _plain_bodies(compressor: TopK, layout: Layout, rows: Sequence[Tensor], out: Tensor) -> Tensor:
    """(W, layout.nbytes): payloads of plain top-k with the values and indices of these fields."""
    sent, scales, *encoded = rows
    # What is between the fields is never looked at.
    bodies = torch.empty(len(sent), layout.nbytes, dtype=torch.uint8, device=out.device)
    values, indices = _rows(bodies, layout)
    index_codecs.decode_(compressor.index_codec, encoded, out.numel(), indices, FUNCTION)
    if compressor.codes is None:
        values.copy_(sent)
    else:
        decode = backend(FUNCTION, compressor.codes.package, out.device).decompress_
        for row in range(len(sent)):
            decode(compressor.codes, values[row], (sent[row], scales[row]), 1.0, False)
    return bodies
