"""What the kernels of a reduction are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from gck.wire import Layout


class Reduction(NamedTuple):
    """Checked arguments of `gck.compressor.reduce_`; numel is at least 1.

    Attributes:
        bodies: (W, layout.nbytes) uint8, added in row order to zeros.
        layout: of each row; may be that of more than numel elements.
        divisor: of the sum: one fp32 division an element.
        server: a compressor of the same kind and chunk size, which compresses the quotient.
        err: (numel,) fp32, its residual, overwritten; or None.
        body: (server.layout(numel).nbytes,) uint8, zeroed.
        nonfinite: (1,) int64, increased by residuals cleared; or None.
    """

    bodies: Tensor
    layout: Layout
    numel: int
    divisor: int
    server: Any
    err: Tensor | None
    body: Tensor
    nonfinite: Tensor | None
