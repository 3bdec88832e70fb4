"""Chunk top-k: the k entries of largest magnitude of every chunk, in few bits each.

Sources: Peng, Quesnelle and Kingma, "DeMo: Decoupled Momentum Optimization" (2024), section 3 (top-k of
each chunk); Wang et al., "Communication Efficient LLM Pre-training with SparseLoCo" (2025), section 3
(chunk top-k with error feedback, 12-bit indices, 2-bit values).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.values import make_plain, shown
from gck.wire import Layout

__all__ = ["VALUE_BITS", "ChunkTopK", "Row", "check_options"]

VALUE_BITS = (32, 16, 8, 4, 2)
# Larger chunks have positions that 12 bits cannot hold.
MAX_CHUNK_OF_12_BITS = 4096
# Ranks keep different places of a chunk, so that a sum has more large entries than an addend; from four times
# k on, training gains little (docs/collectives.md).
MOST_SERVER_FACTOR = 4


class Row(NamedTuple):
    """How many elements of each field one chunk has."""

    values: int
    scales: int
    indices: int


@dataclass(frozen=True)
class ChunkTopK(KernelCompressor):
    """Keeps exactly k entries of every chunk (of a shorter last chunk: at most its length).

    Order is by magnitude with NaN > Inf > finite; the lowest index wins a tie; indices are relative to
    the chunk and ascend. What the values lose to their `value_bits` stays in the residual.

    SparseLoCo's setting is `ChunkTopK(k=64, chunk_size=4096, value_bits=2)`.

    Attributes:
        k: entries kept of a chunk, in [1, chunk_size / 2].
        chunk_size: elements of a chunk, a power of two in [32, 65536].
        value_bits: 32 (fp32), 16 (bf16), 8 or 4 (codes times one scale a chunk), 2 (sign and one of two
            levels a chunk).
        index_bits: 16, or 12 where chunk_size is at most 4096. None: the smaller that fits.
        decay, clip: of residuals, as they are read; see `gck.chunk_topk_ef_`.
        server_k: entries that the second phase of a two-phase all-reduce keeps of a chunk, in
            [1, chunk_size / 2]. None: min(world_size, 4) * k, at most chunk_size / 2.

    Raises:
        ArgumentError: an option is out of range.
        DtypeError: an option is of the wrong type.
    """

    k: int = 64
    chunk_size: int = 4096
    value_bits: int = 16
    index_bits: int | None = None
    decay: float = 1.0
    clip: float | None = None
    server_k: int | None = None

    name: ClassVar[str] = "chunk_topk"
    package: ClassVar[str] = __name__

    def __post_init__(self) -> None:
        make_plain(self, ("k", "chunk_size", "value_bits", "index_bits", "server_k"), ("decay", "clip"))
        check_options("ChunkTopK", self.k, self.chunk_size, self.value_bits, self.index_bits)
        if self.server_k is not None:
            _check_k("ChunkTopK", "server_k", self.server_k, self.chunk_size)
        checks.check_residual("ChunkTopK", self.decay, self.clip)

    @property
    def shard_unit(self) -> int | None:
        return self.chunk_size

    def server_for(self, world_size: int) -> ChunkTopK:
        """The compressor of what has been summed of `world_size` ranks: it keeps `server_k` of a chunk."""
        k = self.server_k
        if k is None:
            k = min(min(world_size, MOST_SERVER_FACTOR) * self.k, self.chunk_size // 2)
        return replace(self, k=k, server_k=None)

    @property
    def packs_indices(self) -> bool:
        """Whether two indices share three bytes; else each has two of its own."""
        if self.index_bits is None:
            return self.chunk_size <= MAX_CHUNK_OF_12_BITS
        return self.index_bits == 12

    @property
    def value_dtype(self) -> torch.dtype:
        return {32: torch.float32, 16: torch.bfloat16}.get(self.value_bits, torch.uint8)

    @property
    def row(self) -> Row:
        """Elements of the fields (values, scales, indices) that one chunk has."""
        coded = self.value_bits <= 8
        return Row(
            -(-self.k * self.value_bits // 8) if coded else self.k,
            (2 if self.value_bits == 2 else 1) if coded else 0,
            -(-self.k * 12 // 8) if self.packs_indices else self.k,
        )

    def chunks(self, numel: int) -> int:
        return -(-numel // self.chunk_size)

    def entries(self, numel: int) -> int:
        """See `gck.compressor.entries_of`."""
        whole, rest = divmod(numel, self.chunk_size)
        return whole * self.k + min(rest, self.k)

    def layout(self, numel: int) -> Layout:
        chunks, row = self.chunks(numel), self.row
        return Layout.of(
            (self.value_dtype, chunks * row.values),
            (torch.float32, chunks * row.scales),
            (torch.uint8 if self.packs_indices else torch.uint16, chunks * row.indices),
        )

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> ChunkTopK:
        """The compressor that decodes a payload with these fields; options: chunk_size, k, value_bits."""
        chunk_size, k, value_bits = options
        return cls(k, chunk_size, value_bits, 12 if fields[2].dtype == torch.uint8 else 16)

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        values, scales, indices = fields
        wanted = tuple(field.dtype for field in self.layout(0).fields)
        if tuple(field.dtype for field in fields) != wanted:
            raise DtypeError(
                f"{function}: payload of {self.value_bits}-bit values must hold values, scales and indices "
                f"of {wanted}, got {values.dtype}, {scales.dtype} and {indices.dtype}"
            )
        # A shard's body may be longer than the part of the vector that it covers.
        held = Row(values.numel(), scales.numel(), indices.numel())
        rows = held.indices // self.row.indices
        if rows < self.chunks(numel) or held != Row(*(rows * count for count in self.row)):
            raise CorruptPayloadError(
                f"{function}: payload of {held.values} values, {held.scales} scales and {held.indices} "
                f"indices does not fit {numel} elements in chunks of {self.chunk_size} with k={self.k}"
            )


def check_options(
    function: str, k: object, chunk_size: object, value_bits: object, index_bits: object = None
) -> None:
    """Raises unless the options of a `ChunkTopK` are in range."""
    size = checks.check_power_of_two(function, "chunk_size", chunk_size, 32, 65536)
    _check_k(function, "k", k, size)
    if isinstance(value_bits, bool) or not isinstance(value_bits, int):
        raise DtypeError(f"{function}: value_bits must be an int, got {shown(value_bits)}")
    if value_bits not in VALUE_BITS:
        raise ArgumentError(f"{function}: value_bits must be one of 32, 16, 8, 4, 2, got {value_bits}")
    if index_bits is None:
        return
    if isinstance(index_bits, bool) or not isinstance(index_bits, int):
        raise DtypeError(f"{function}: index_bits must be an int or None, got {shown(index_bits)}")
    if index_bits not in ((12, 16) if size <= MAX_CHUNK_OF_12_BITS else (16,)):
        raise ArgumentError(
            f"{function}: index_bits must be 16, or 12 where chunk_size is at most {MAX_CHUNK_OF_12_BITS}, "
            f"got {index_bits} with chunk_size {size}"
        )


def _check_k(function: str, name: str, k: object, chunk_size: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise DtypeError(f"{function}: {name} must be an int, got {shown(k)}")
    if not 1 <= k <= chunk_size // 2:
        raise ArgumentError(f"{function}: {name} must be in [1, chunk_size / 2 = {chunk_size // 2}], got {k}")
