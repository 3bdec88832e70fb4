"""The part that every compressor shares: check the arguments, then call the kernel of the device.

A compressor's folder has three backends, `reference`, `cpu` and `gpu`. `cpu` and `gpu` define

    compress_(compressor, grad, err, bodies, nonfinite, clip=None, stats=None)      # flat tensors, already
                                                                 # checked; see `run`
    decompress_(compressor, out, fields, alpha, accumulate)      # fields: the payload's typed tensors

may define, where one pass over `out` is possible for all ranks' payloads together,

    decompress_sum_(compressor, out, bodies, layout, alpha, accumulate)      # bodies: (W, layout.nbytes)

and, where that pass can take the mean, too,

    decompress_mean_(compressor, out, bodies, layout, alpha, accumulate, divisor)

and, where one pass makes the payload of a sum of payloads,

    reduce_(compressor, job)      # job: a `gck.kernels.common.reduction.Reduction`

and `reference`, the oracle, which shares no code with them,

    compress(compressor, grad, err) -> (fields, new_err, cleared)
    decompress(compressor, fields, numel) -> dense
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gck.average import average_
from gck.compressor import check_seeded, reduce_by_steps_, shard_numel
from gck.errors import (
    ArgumentError,
    BackendUnavailableError,
    CorruptPayloadError,
    DeviceMismatchError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.common import checks
from gck.kernels.common.reduction import checked_reduction
from gck.wire import Layout

JOINED_BELOW = 256 << 10  # bytes of a shard's body; a copy of them takes about as long as a call


def backend(function: str, package: str, device: torch.device) -> Any:
    """The module with the kernels of `package` for `device`."""
    module = _modules.get((package, device.type))
    if module is None:
        if device.type not in ("cpu", "cuda"):
            raise DeviceMismatchError(f"{function}: no kernel for device {device}; use cpu or cuda")
        try:
            module = import_module(f"{package}.{'cpu' if device.type == 'cpu' else 'gpu'}")
        except ImportError as error:
            if device.type == "cpu":
                raise
            raise BackendUnavailableError(
                f"{function}: tensors on {device} need Triton, which cannot be imported ({error}); "
                "`pip install triton`, or move the tensors to the CPU"
            ) from error
        _modules[package, device.type] = module
    return module


_modules: dict[tuple[str, str], Any] = {}


class KernelCompressor(ABC):
    """Base of the compressors in this package; implements `gck.compressor.Compressor`."""

    name: ClassVar[str]
    package: ClassVar[str]  # whose cpu and gpu modules hold the kernels
    # See `gck.compressor.sums_or_raises`.
    sums_or_raises: ClassVar[bool] = True
    # What is added to a gradient is clamp(decay * err, -clip, clip): see `gck.topk_ef_`.
    decay: float = 1.0
    clip: float | None = None

    @property
    @abstractmethod
    def shard_unit(self) -> int | None: ...

    @abstractmethod
    def layout(self, numel: int) -> Layout: ...

    def at(self, start: int) -> Self | None:
        """See `gck.compressor.compressor_at`: the same, where chunks do not depend on their places."""
        return None if self.shard_unit is None else self

    def compress_(
        self, grad: Tensor, err: Tensor | None, bodies: Tensor, *, nonfinite: Tensor | None = None
    ) -> None:
        """See `gck.compressor.Compressor.compress_`."""
        self.compress(f"{type(self).__name__}.compress_", grad, err, bodies, nonfinite)

    def decompress_(
        self,
        out: Tensor,
        body: Tensor,
        *,
        capacity: int | None = None,
        alpha: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        """See `gck.compressor.Compressor.decompress_`."""
        fields = self.layout(out.numel() if capacity is None else capacity).views(body)
        self.decompress(f"{type(self).__name__}.decompress_", out, fields, alpha, accumulate)

    def decompress_sum_(
        self,
        out: Tensor,
        bodies: Tensor,
        *,
        capacity: int | None = None,
        alpha: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        """Writes the sum of alpha * decoded over the rows of bodies to `out`, or adds it when `accumulate`.

        The same bits as `decompress_` with accumulate of one row after the other, to zeros or to `out`; for
        all rows in one pass over `out` where the kernels can.

        Args:
            out: (numel,) fp32 contiguous; overwritten.
            bodies: (W, nbytes) uint8, rows contiguous and aligned to 16 bytes.
            capacity, alpha: see `decompress_`.

        Raises:
            CorruptPayloadError: before anything is written, where the check costs no host sync and the
                kernels take all rows in one pass.
        """
        function = f"{type(self).__name__}.decompress_sum_"
        layout = self.layout(out.numel() if capacity is None else capacity)
        self.decompress_sum(function, out, bodies, layout, alpha, accumulate)

    def decompress_mean_(
        self, out: Tensor, bodies: Tensor, divisor: int, *, capacity: int | None = None
    ) -> None:
        """Writes the sum of what the rows of bodies decode to, divided by `divisor`: the bits of
        `decompress_sum_` and `gck.average.average_`. Errors as of the former."""
        function = f"{type(self).__name__}.decompress_mean_"
        layout = self.layout(out.numel() if capacity is None else capacity)
        self.decompress_sum(function, out, bodies, layout, 1.0, False, divisor)

    def decompress_shards_(self, out: Tensor, bodies: Tensor, shard: int) -> None:
        """See `gck.compressor.decompress_shards_`.

        Fields have a row for every chunk, so that those of many bodies, one behind the other, are those of
        one body. Where bodies are small, copying them together costs less than a call for each: in a world of
        1024 ranks these calls take longer than all other work.

        Raises:
            CorruptPayloadError: where the check costs no host sync.
        """
        function, layout = f"{type(self).__name__}.decompress_shards_", self.layout(shard)
        joined = out.numel() // shard if shard and layout.nbytes < JOINED_BELOW else 0
        if joined > 1:
            # `contiguous` first: a column of single bytes would stay the view that it is.
            columns = (bodies[:joined, f.offset : f.end].contiguous() for f in layout.fields)
            fields = tuple(c.view(-1).view(f.dtype) for c, f in zip(columns, layout.fields, strict=True))
            self.decompress(function, out[: joined * shard], fields, 1.0, False)
            out, bodies = out[joined * shard :], bodies[joined:]
        for part, body in zip(out.split(shard) if out.numel() else (), bodies, strict=False):
            fitting = layout if part.numel() == shard else self.layout(part.numel())
            self.decompress(function, part, fitting.views(body[: fitting.nbytes]), 1.0, False)

    def reduce_(
        self,
        bodies: Tensor,
        err: Tensor | None,
        body: Tensor,
        numel: int,
        *,
        capacity: int | None = None,
        divisor: int = 1,
        nonfinite: Tensor | None = None,
    ) -> None:
        """See `gck.compressor.reduce_`; in one pass over err and the payloads where the kernels can.

        Args:
            bodies, body: rows, and the body, start at multiples of 16 bytes.

        Raises:
            ArgumentError: numel, capacity or divisor is out of range.
            ShapeMismatchError, DtypeError, LayoutError, DeviceMismatchError: a tensor does not fit.
            CorruptPayloadError: before anything is written, where the check costs no host sync.
        """
        function = f"{type(self).__name__}.reduce_"
        given = bodies, err, body, numel, numel if capacity is None else capacity, divisor, nonfinite
        job = checked_reduction(function, self, *given)
        check_seeded(function, job.server)
        if not numel:
            return
        kernels, server = backend(function, self.package, bodies.device), job.server
        alike = isinstance(server, KernelCompressor) and (
            (server.package, server.shard_unit) == (self.package, self.shard_unit)
        )
        if alike and hasattr(kernels, "reduce_"):
            if server.clip is not None:
                job = job._replace(clip=checks.clip_of(server.clip, bodies.device))
            with _naming(function):
                kernels.reduce_(self, job)
        else:
            reduce_by_steps_(
                self, bodies, job.err, body, numel, capacity=capacity, divisor=divisor, nonfinite=nonfinite
            )

    def check_inputs(
        self, function: str, grad: Tensor, err: Tensor | None, nonfinite: Tensor | None = None
    ) -> None:
        """Everything that can be said of the inputs without looking at memory."""
        check_seeded(function, self)
        if err is None:
            checks.check_grad(function, grad)
        else:
            checks.check_pair(function, grad, err)
        checks.check_nonfinite(function, nonfinite, grad)

    def compress(
        self, function: str, grad: Tensor, err: Tensor | None, bodies: Tensor, nonfinite: Tensor | None
    ) -> None:
        """`compress_` on behalf of the public function that error texts shall name."""
        self.check_inputs(function, grad, err, nonfinite)
        if grad.is_neg():
            raise LayoutError(f"{function}: grad is negated lazily; pass grad.resolve_neg()")
        self.check_fits(function, grad, bodies)
        self.run(function, grad, err, bodies, nonfinite)

    def check_fits(self, function: str, grad: Tensor, bodies: Tensor) -> None:
        """Raises unless the rows of `bodies` are as large as those that a gradient becomes."""
        shards = checks.check_bodies(function, bodies, grad)
        if shards > 1 and self.shard_unit is None:
            raise ArgumentError(f"{function}: {self} cannot be cut into shards, got {shards}")
        nbytes = self.layout(shard_numel(grad.numel(), self.shard_unit, shards)).nbytes
        if bodies.shape[1] != nbytes:
            raise ShapeMismatchError(
                f"{function}: bodies must be ({shards}, {nbytes}), got {tuple(bodies.shape)}"
            )

    def run(
        self,
        function: str,
        grad: Tensor,
        err: Tensor | None,
        bodies: Tensor,
        nonfinite: Tensor | None,
        clip: Tensor | None = None,
        **options: Tensor | None,
    ) -> None:
        """`compress` of what `check_inputs` has passed, into bodies that fit.

        Args:
            bodies: (S, nbytes); or the one body (nbytes,), where `shard_unit` is None.
            clip: one fp32 element, in place of the compressor's own.
            options: further tensors that this compressor's kernels know, by name; None: not given. All are
                written to. `stats`, (5,) fp64, needs a single body.
        """
        if clip is None and self.clip is not None:
            clip = checks.clip_of(self.clip, grad.device)
        kernels = backend(function, self.package, grad.device)
        if err is None:
            # x + (-0.0) is x for every x, so that this is the same as having no residual.
            err = torch.full((grad.numel(),), -0.0, dtype=torch.float32, device=grad.device)
        if clip is not None:
            options["clip"] = clip
        others = [tensor for tensor in (nonfinite, *options.values()) if tensor is not None]
        if not checks.apart([grad, err, *others]):
            tensors = {"grad": grad, "err": err, "nonfinite": nonfinite, **options}
            checks.check_no_overlap(function, **{name: t for name, t in tensors.items() if t is not None})
        if grad.numel():
            kernels.compress_(self, _flat(grad), _flat(err), bodies, nonfinite, **options)
        elif (stats := options.get("stats")) is not None:
            stats.zero_()

    def decompress(
        self, function: str, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
    ) -> None:
        """`decompress_` of typed fields, on behalf of the public function that error texts shall name."""
        checks.check_fp32(function, "out", out)
        for index, field in enumerate(fields):
            checks.check_tensor(function, f"payload field {index}", field)
            checks.check_not_recorded(function, f"payload field {index}", field)
            checks.check_device(function, f"payload field {index}", field, "out", out)
            checks.check_no_overlap(function, **{"out": out, f"payload field {index}": field})
        alpha = checks.check_alpha(function, alpha)
        self.check_fields(function, out.numel(), fields)
        kernels = backend(function, self.package, out.device)
        if out.numel():
            with _naming(function):
                kernels.decompress_(self, _flat(out), fields, alpha, accumulate)

    def decompress_sum(
        self,
        function: str,
        out: Tensor,
        bodies: Tensor,
        layout: Layout,
        alpha: float,
        accumulate: bool,
        divisor: int = 1,
    ) -> None:
        """`decompress_sum_` or `decompress_mean_` of bodies with this layout, on behalf of a function."""
        checks.check_fp32(function, "out", out)
        rows = checks.check_bodies(function, bodies, out, "out")
        if bodies.shape[1] != layout.nbytes:
            raise CorruptPayloadError(
                f"{function}: bodies must be ({rows}, {layout.nbytes}), got {tuple(bodies.shape)}"
            )
        self.check_fields(function, out.numel(), layout.views(bodies[0]))
        rows_of = {f"payload {row}": body for row, body in enumerate(bodies)}
        checks.check_no_overlap(function, out=out, **rows_of)
        alpha = checks.check_alpha(function, alpha)
        kernels = backend(function, self.package, out.device)
        given = _flat(out), bodies, layout, alpha, accumulate
        if out.numel() and divisor != 1 and hasattr(kernels, "decompress_mean_"):
            with _naming(function):
                kernels.decompress_mean_(self, *given, divisor)
            return
        if out.numel() and hasattr(kernels, "decompress_sum_"):
            with _naming(function):
                kernels.decompress_sum_(self, *given)
            if divisor != 1:
                average_(out, divisor)
            return
        # Nothing is written to out before all rows have been accepted.
        total = out.clone() if accumulate else torch.zeros_like(out)
        for body in bodies:
            self.decompress(function, total, layout.views(body), alpha, True)
        if divisor != 1:
            average_(total, divisor)
        out.copy_(total)

    @abstractmethod
    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        """Dtypes and lengths of a payload that decodes to `numel` elements."""


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 1 else tensor.view(-1)


@contextmanager
def _naming(function: str) -> Iterator[None]:
    """Kernels say what is wrong with a payload; the error says who was called, too."""
    try:
        yield
    except CorruptPayloadError as error:
        raise CorruptPayloadError(f"{function}: {error}") from None
