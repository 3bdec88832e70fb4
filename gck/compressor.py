"""The Compressor protocol, and the registry of compressors by name.

A compressor is a small immutable value: a frozen dataclass that holds its options and knows how to
turn (gradient, residual) into bytes and bytes back into a dense vector. Collectives use this protocol
and nothing else.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from gck.average import average_
from gck.errors import ArgumentError, DtypeError
from gck.memory import empty
from gck.values import shown
from gck.wire import Layout

__all__ = [
    "REGISTRY",
    "Compressor",
    "check_compressor",
    "check_seeded",
    "compressor_at",
    "compressor_class",
    "compressor_of_step",
    "decodes_anything",
    "decompress_sum_",
    "describe",
    "entries_of",
    "is_seeded",
    "preview_",
    "previews",
    "reduce_",
    "reduce_by_steps_",
    "residual_of",
    "server_of",
    "shard_numel",
    "summed_of",
    "sums_or_raises",
]

# One line a compressor: registry name -> module and class. Imported on first use, never before, so
# that this module stays below the kernels.
REGISTRY = {
    "topk": "gck.kernels.topk:TopK",
    "sign": "gck.kernels.sign:Sign",
    "chunk_topk": "gck.kernels.chunk_topk:ChunkTopK",
    "quantize": "gck.kernels.quantize:Quantize",
    "random_k": "gck.kernels.random_k:RandomK",
    "low_rank": "gck.kernels.low_rank:LowRank",
}


@runtime_checkable
class Compressor(Protocol):
    """What a collective needs to know of a compressor."""

    name: ClassVar[str]

    @property
    def shard_unit(self) -> int | None:
        """Elements that must stay together (a chunk), or None where a vector cannot be split.

        Compressors with a unit run on the two-phase all-reduce; the others on the all-gather.
        """
        ...

    def layout(self, numel: int) -> Layout:
        """Fields of the body that a vector of `numel` elements becomes; depends on nothing else."""
        ...

    def compress_(
        self, grad: Tensor, err: Tensor | None, bodies: Tensor, *, nonfinite: Tensor | None = None
    ) -> None:
        """Compresses acc = fp32(grad) + err into `bodies`; err becomes acc - decoded.

        Args:
            grad: fp32, bf16 or fp16, contiguous; read only.
            err: fp32, same numel and device; overwritten. None: compress grad alone.
            bodies: (S, layout(shard).nbytes) uint8, each row contiguous, **zeroed**, where shard =
                `shard_numel(numel, shard_unit, S)`; row s receives elements [s * shard, (s+1) * shard)
                of acc. S must be 1 where `shard_unit` is None.
            nonfinite: (1,) int64 on the same device; increased by the number of entries whose
                residual was not finite and was therefore cleared to zero.
        """
        ...

    def decompress_(
        self,
        out: Tensor,
        body: Tensor,
        *,
        capacity: int | None = None,
        alpha: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        """Writes alpha * decoded to `out`, or adds it when `accumulate`.

        Args:
            out: (numel,) fp32 contiguous; overwritten.
            body: (nbytes,) uint8.
            capacity: elements that the body was laid out for, at least out.numel(); the last shard of
                a vector is often cut short by the vector's end. Default: out.numel().
            alpha: one multiplication in fp32, then one addition.

        Raises:
            CorruptPayloadError: before anything is written, where the check costs no host sync.
        """
        ...


def check_compressor(function: str, compressor: object) -> Compressor:
    """Raises DtypeError unless `compressor` is one; a class, which has what its instances have, is none."""
    if isinstance(compressor, type) or not isinstance(compressor, Compressor):
        raise DtypeError(f"{function}: compressor must be a Compressor, got {shown(compressor)}")
    return compressor


def decodes_anything(compressor: Compressor) -> bool:
    """Whether every body of the right size decodes: none can turn out to be corrupt. Such a compressor has an
    attribute of that name which is True."""
    return bool(getattr(compressor, "decodes_anything", False))


def sums_or_raises(compressor: Compressor) -> bool:
    """Whether `decompress_sum_` and `decompress_mean_` leave `out` as it was where they raise. Such a
    compressor has an attribute of that name which is True."""
    return bool(getattr(compressor, "sums_or_raises", False))


def entries_of(compressor: Compressor, numel: int) -> int:
    """How many entries of `numel` elements a payload has: what the method `entries(numel)` says, where the
    compressor has one, else all."""
    entries = getattr(compressor, "entries", None)
    return int(entries(numel)) if callable(entries) else numel


def is_seeded(compressor: Compressor) -> bool:
    """Whether all ranks choose the same entries, so that payloads can be added up value by value.

    Such a compressor has an attribute `summed`, see `summed_of`, and payloads of values alone.
    """
    return getattr(compressor, "summed", None) is not None


def summed_of(compressor: Compressor) -> Compressor:
    """The compressor whose payload is the sum of payloads of a seeded one: its values are fp32."""
    summed: Compressor = compressor.summed  # type: ignore[attr-defined]
    return summed


def previews(compressor: Compressor) -> bool:
    """Whether `preview_` may come to something. Such a compressor has a method of that name, and an attribute
    `previews` which is True."""
    return bool(getattr(compressor, "previews", False))


def preview_(compressor: Compressor, grad: Tensor, err: Tensor | None, bodies: Tensor) -> bool:
    """Writes to `bodies` what `compress_` would, and leaves err as it is, where that takes less time: so that
    a message can leave before the residual is what it will be.

    Args:
        grad, err, bodies: as of `Compressor.compress_`.

    Returns:
        False: nothing was done. By compressor, device and content; each rank may get another answer.
    """
    done: bool = previews(compressor) and compressor.preview_(grad, err, bodies)  # type: ignore[attr-defined]
    return done


def decompress_sum_(
    compressor: Compressor, out: Tensor, bodies: Tensor, *, capacity: int | None = None
) -> None:
    """out = the sum of what the rows of `bodies` decode to, added in order to zeros.

    A compressor that can do it in one pass has a method `decompress_sum_` (see
    `gck.kernels.common.base.KernelCompressor`); any other decodes one row after the other.

    Args:
        out: (numel,) fp32 contiguous; overwritten.
        bodies: (W, nbytes) uint8, rows contiguous.
        capacity: see `Compressor.decompress_`.
    """
    fused = getattr(compressor, "decompress_sum_", None)
    if fused is not None:
        fused(out, bodies, capacity=capacity)
        return
    out.zero_()
    for body in bodies:
        compressor.decompress_(out, body, capacity=capacity, accumulate=True)


def decompress_mean_(compressor: Compressor, out: Tensor, bodies: Tensor, divisor: int) -> None:
    """`decompress_sum_`, and out /= divisor; by a method of this name, where there is one, in one pass."""
    fused = getattr(compressor, "decompress_mean_", None)
    if fused is not None:
        fused(out, bodies, divisor)
        return
    decompress_sum_(compressor, out, bodies)
    if divisor != 1:
        average_(out, divisor)


def decompress_shards_(compressor: Compressor, out: Tensor, bodies: Tensor, shard: int) -> None:
    """Writes what the rows of `bodies` decode to side by side: row s to out[s * shard : (s + 1) * shard].

    A row that `out` ends in was laid out for the elements that it has, and starts where the others do; those
    behind it are not looked at. A compressor that can do it in one pass has a method `decompress_shards_`
    (see `gck.kernels.common.base.KernelCompressor`); any other decodes one row after the other.

    Args:
        out: (numel,) fp32 contiguous; overwritten.
        bodies: (S, compressor.layout(shard).nbytes) uint8, rows contiguous, with S * shard >= numel.
        shard: elements a row, a multiple of shard_unit.
    """
    fused = getattr(compressor, "decompress_shards_", None)
    if fused is not None:
        fused(out, bodies, shard)
        return
    for part, body in zip(out.split(shard), bodies, strict=False):
        compressor.decompress_(part, body[: compressor.layout(part.numel()).nbytes])


def reduce_(
    compressor: Compressor,
    bodies: Tensor,
    err: Tensor | None,
    body: Tensor,
    numel: int,
    *,
    capacity: int | None = None,
    divisor: int = 1,
    nonfinite: Tensor | None = None,
) -> None:
    """The body of the sum of what the rows of `bodies` decode to: what an owner does in the second phase.

    acc = (sum of the rows, added in order to zeros) / divisor + err, each operation rounded once in fp32, is
    compressed by `server_of(compressor, W)` into `body`; err becomes acc - decoded.

    A compressor that can do it in one pass has a method `reduce_` (see
    `gck.kernels.common.base.KernelCompressor`); for any other it is done by steps, with the same bytes.

    Args:
        bodies: (W, compressor.layout(capacity).nbytes) uint8, rows contiguous; read only.
        err: (numel,) fp32 contiguous; overwritten. None: no residual.
        body: (server_of(compressor, W).layout(numel).nbytes,) uint8 contiguous, **zeroed**.
        numel: elements of the sum.
        capacity: elements that each row was laid out for, at least numel. Default: numel.
        divisor: 1 for a sum, W for a mean.
        nonfinite: (1,) int64; increased by the residual entries cleared because not finite.

    Raises:
        CorruptPayloadError: before anything is written, where the check costs no host sync.
    """
    fused = getattr(compressor, "reduce_", None)
    reduce = fused if fused is not None else partial(reduce_by_steps_, compressor)
    reduce(bodies, err, body, numel, capacity=capacity, divisor=divisor, nonfinite=nonfinite)


def reduce_by_steps_(
    compressor: Compressor,
    bodies: Tensor,
    err: Tensor | None,
    body: Tensor,
    numel: int,
    *,
    capacity: int | None = None,
    divisor: int = 1,
    nonfinite: Tensor | None = None,
) -> None:
    """`reduce_` of any compressor: decode and add, divide, compress; three passes over a dense vector."""
    total = empty(numel, torch.float32, bodies.device)
    decompress_sum_(compressor, total, bodies, capacity=capacity)
    if divisor != 1:
        average_(total, divisor)
    server = server_of(compressor, bodies.shape[0])
    server.compress_(total, err, body.unsqueeze(0), nonfinite=nonfinite)


def server_of(compressor: Compressor, world_size: int) -> Compressor:
    """The compressor of the second phase, for what an owner has summed of `world_size` ranks: what the method
    `server_for(world_size)` returns, where the compressor has one, else the same compressor.

    A compressor that draws random numbers has one, because what it draws in the second phase must not be what
    the addends were rounded by; so has one that keeps few entries, because a sum has more of them than an
    addend. The server's shard_unit is that of the compressor; its layout need not be.
    """
    server_for = getattr(compressor, "server_for", None)
    if server_for is None:
        return compressor
    server: Compressor = server_for(world_size)
    return server


def compressor_at(compressor: Compressor, start: int) -> Compressor | None:
    """The compressor of a part of a vector: `compressor.at(start)`; None where it cannot be told.

    It makes of each chunk what the compressor makes of it in the whole vector. One that draws random numbers
    by an element's index must know where a part starts. One without a method `at` may have to, too: its
    vectors are never cut into parts other than the rows of `compress_`.

    Args:
        start: index, in the vector, of the part's first element; a multiple of shard_unit.
    """
    at = getattr(compressor, "at", None)
    part: Compressor | None = None if at is None else at(start)
    return part


def compressor_of_step(compressor: Compressor, step: int, rank: int) -> Compressor:
    """What the method `for_step(step, rank)` returns, where the compressor has one: that of a training's step
    on one rank, where it was made without the seed that each step needs. Else the same compressor."""
    for_step = getattr(compressor, "for_step", None)
    if for_step is None:
        return compressor
    chosen: Compressor = for_step(step, rank)
    return chosen


def check_seeded(function: str, compressor: object) -> None:
    """Raises ArgumentError where a compressor leaves its seed to `for_step`. Such a compressor has an
    attribute `unseeded` which is True."""
    if getattr(compressor, "unseeded", False):
        raise ArgumentError(
            f"{function}: {compressor} has no seed, and needs another one at every step, such as seed=step "
            "for random-k and step * world_size + rank for rounding; only gck.ddp, gck.fsdp and gck.diloco, "
            "which count steps, choose it"
        )


def residual_of(compressor: Compressor, err: Tensor) -> Tensor:
    """What `compressor` adds of a residual to a gradient: clamp(decay * err, -clip, clip) where it has
    these options, else err itself."""
    decay, clip = getattr(compressor, "decay", 1.0), getattr(compressor, "clip", None)
    residual = err if decay == 1 else err * decay
    return residual if clip is None else residual.clamp(-clip, clip)


def compressor_class(name: str) -> Any:
    """The class registered under `name`.

    Raises:
        ArgumentError: no compressor has that name.
    """
    try:
        module, _, attribute = REGISTRY[name].partition(":")
    except KeyError:
        known = ", ".join(sorted(REGISTRY))
        raise ArgumentError(f"compressor_class: name must be one of {known}, got {name!r}") from None
    return getattr(import_module(module), attribute)


def describe(compressor: object, *, of_a_step: bool = True) -> str:
    """A compressor's configuration as text that is the same in every process.

    Fields that do not count in comparisons, such as the seed of a rounding, are left out: ranks may differ in
    them, and they may be others at every step. Fields whose metadata say "of_a_step", such as the seed of a
    choice, are others at every step, too, but ranks must agree on them: they are left out on request.
    """
    if dataclasses.is_dataclass(compressor):
        fields = [
            field.name
            for field in dataclasses.fields(compressor)
            if field.compare and (of_a_step or not field.metadata.get("of_a_step"))
        ]
        options = ", ".join(f"{name}={getattr(compressor, name)!r}" for name in fields)
        return f"{type(compressor).__qualname__}({options})"
    return f"{type(compressor).__module__}.{type(compressor).__qualname__}"


def shard_numel(numel: int, unit: int | None, shards: int) -> int:
    """Elements a shard when `numel` elements are cut into `shards` runs of whole units.

    Every shard has this capacity; the last ones may be partly or wholly empty. A single shard is the
    vector itself, whose last unit may be cut short.

    Raises:
        ArgumentError: numel is negative, or unit or shards less than 1.
    """
    if numel < 0 or shards < 1 or (unit is not None and unit < 1):
        raise ArgumentError(
            "shard_numel: numel must be at least 0, unit and shards at least 1, "
            f"got {numel}, {unit}, {shards}"
        )
    if unit is None or shards == 1:
        return numel
    units = -(-numel // unit)
    return -(-units // shards) * unit
