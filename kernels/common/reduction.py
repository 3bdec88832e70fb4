"""What the kernels of a reduction are given."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gck.compressor import Compressor, server_of
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError, ShapeMismatchError
from gck.kernels.common import checks
from gck.values import shown
from gck.wire import Layout

MOST_DIVISOR = 1 << 24  # up to which every integer is an fp32 number


class Reduction(NamedTuple):
    """Checked arguments of `gck.compressor.reduce_`; to kernels, numel is at least 1.

    Attributes:
        bodies: (W, layout.nbytes) uint8, added in row order to zeros.
        layout: of each row; may be that of more than numel elements.
        divisor: of the sum: one fp32 division an element.
        server: a compressor of the same kind and chunk size, which compresses the quotient.
        err: (numel,) fp32, its residual, overwritten; or None.
        body: (server.layout(numel).nbytes,) uint8, zeroed.
        nonfinite: (1,) int64, increased by residuals cleared; or None.
        clip: one fp32 element, or None; clamp(server.decay * err, -clip, clip) is added.
    """

    bodies: Tensor
    layout: Layout
    numel: int
    divisor: int
    server: Any
    err: Tensor | None
    body: Tensor
    nonfinite: Tensor | None
    clip: Tensor | None = None


def checked_reduction(
    function: str,
    compressor: Compressor,
    bodies: Tensor,
    err: Tensor | None,
    body: Tensor,
    numel: int,
    capacity: int,
    divisor: int,
    nonfinite: Tensor | None,
) -> Reduction:
    """These arguments, if nothing is wrong with them that can be said without looking at memory."""
    for name, value in (("numel", numel), ("capacity", capacity), ("divisor", divisor)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
    if not 0 <= numel <= capacity:
        raise ArgumentError(f"{function}: numel must be in [0, capacity], got {numel} and {capacity}")
    if not 1 <= divisor <= MOST_DIVISOR:
        raise ArgumentError(f"{function}: divisor must be in [1, {MOST_DIVISOR}], got {divisor}")
    layout = compressor.layout(capacity)
    rows = checks.check_bodies(function, bodies, bodies, "bodies")
    server = server_of(compressor, rows)
    if bodies.shape[1] != layout.nbytes:
        raise CorruptPayloadError(
            f"{function}: bodies must be ({rows}, {layout.nbytes}), got {tuple(bodies.shape)}"
        )
    checks.check_tensor(function, "body", body)
    nbytes = server.layout(numel).nbytes
    if body.dtype != bodies.dtype or body.shape != (nbytes,):
        raise ShapeMismatchError(
            f"{function}: body must be ({nbytes},) uint8, got {tuple(body.shape)} of {body.dtype}"
        )
    checks.check_bodies(function, body.unsqueeze(0), bodies, "bodies")
    written = {"body": body}
    if err is not None:
        checks.check_fp32(function, "err", err)
        checks.check_device(function, "err", err, "bodies", bodies)
        if err.numel() != numel:
            raise ShapeMismatchError(f"{function}: err must have {numel} elements, got {err.numel()}")
        written["err"] = err
    checks.check_nonfinite(function, nonfinite, bodies, "bodies")
    if nonfinite is not None:
        written["nonfinite"] = nonfinite
    read = {f"bodies[{row}]": each for row, each in enumerate(bodies)}
    if not checks.apart([*read.values(), *written.values()]):
        checks.check_no_overlap(function, **read, **written)
    flat = None if err is None else err.view(-1)
    return Reduction(bodies, layout, numel, divisor, server, flat, body, nonfinite)
