"""Payload types: what a compressor hands to the network.

A payload is a NamedTuple of tensors. The tensors are views of one contiguous buffer laid out as the
wire body (see `gck.wire`), so sending it copies nothing. Payloads made by hand from separate tensors
are accepted everywhere as well.

To keep a payload or to send it to another process, use `gck.to_bytes(payload)` and `gck.from_bytes`, not
torch.save or pickle: these write the memory that its tensors share once for each of them, refuse to, or
write what they cannot read again (the words of `PackedSigns`); the errors are theirs.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gck.wire import layout_of

__all__ = [
    "MOST_COLUMNS",
    "MOST_RANK",
    "ChunkSparse",
    "CodedSparse",
    "LowRankFactors",
    "PackedSigns",
    "Payload",
    "Quantized",
    "SeededValues",
    "SparseGrad",
]

MOST_RANK, MOST_COLUMNS = 64, 2**31 - 1  # of low rank


class SparseGrad(NamedTuple):
    """The k largest entries of a vector.

    Attributes:
        values: (k,) fp32, bf16 or fp16.
        indices: (k,) int32 (int64 when numel > 2**31 - 1), strictly ascending positions in the
            flattened vector.
        numel: number of elements of the dense vector.
    """

    values: Tensor
    indices: Tensor
    numel: int

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "topk"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.values, self.indices

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class CodedSparse(NamedTuple):
    """The k largest entries of a vector, their indices by a codec: see docs/index_codecs.md.

    Attributes:
        values: (k,) fp32, bf16 or fp16; or (ceil(k * value_bits / 8),) uint8, codes in two's complement,
            little end first, decoded as code * scale.
        scales: (ceil(k / 512),) fp32 where values are codes, one for each 512 entries; else (0,).
        index_low: what the codec keeps of each index: elias_fano: (bytes,) uint8, its lower bits; block16:
            (k,) uint16, its position in a block of 65,536 elements; int32: all of it.
        index_high: what the codec keeps of the rest: elias_fano: (bytes,) uint8, the upper bits in unary;
            block16: the number of entries up to the end of each block; int32: (0,).
        numel: number of elements of the dense vector.
        k: entries.
        index_codec: "int32", "block16" or "elias_fano".
        value_bits: 8 or 4 where values are codes, else 0.
    """

    values: Tensor
    scales: Tensor
    index_low: Tensor
    index_high: Tensor
    numel: int
    k: int
    index_codec: str
    value_bits: int = 0

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "topk"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.values, self.scales, self.index_low, self.index_high

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class PackedSigns(NamedTuple):
    """One bit an element and one scale a chunk.

    Attributes:
        words: (ceil(numel / 32),) uint32; bit i of word w is element 32 * w + i, 1 means >= 0;
            bits past numel are 0.
        scales: (ceil(numel / chunk_size),) fp32, the mean magnitude of the chunk's valid elements.
        numel: number of elements of the dense vector.
        chunk_size: elements a chunk, a power of two in [32, 8192].
    """

    words: Tensor
    scales: Tensor
    numel: int
    chunk_size: int

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "sign"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.words, self.scales

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class ChunkSparse(NamedTuple):
    """The k largest entries of every chunk of a vector; rows are chunks.

    A last chunk of fewer than k elements fills the start of its row; the rest is zero and never decoded.

    Attributes:
        values: (chunks, k) fp32 or bf16; or (chunks, ceil(k * value_bits / 8)) uint8, codes little end
            first. 8 and 4 bits: code in two's complement, decoded as code * scale. 2 bits: bit 1 is 1
            for >= 0, bit 0 is 1 for the high level.
        scales: (chunks, 1) fp32 for 8 and 4 bits, (chunks, 2) fp32 for 2 bits: the low and the high level;
            else (chunks, 0).
        indices: positions in the chunk, strictly ascending: (chunks, k) uint16, or (chunks,
            ceil(k * 12 / 8)) uint8 of 12 bits each, little end first.
        numel: number of elements of the dense vector.
        chunk_size: elements of a chunk, a power of two in [32, 65536].
        k: entries of a chunk.
        value_bits: 32, 16, 8, 4 or 2.
    """

    values: Tensor
    scales: Tensor
    indices: Tensor
    numel: int
    chunk_size: int
    k: int
    value_bits: int

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "chunk_topk"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.values, self.scales, self.indices

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class Quantized(NamedTuple):
    """A code of a few bits an element, and a scale or two levels a chunk.

    Attributes:
        codes: (ceil(numel * bits / 8),) uint8, little end first: element i is at bits [i * bits, (i + 1) *
            bits). With scale "max" in two's complement, decoded as code * scale; with "mean" bit 1 is 1 for
            >= 0, bit 0 is 1 for the high level. Bits past the last element are 0.
        scales: (ceil(numel / chunk_size),) fp32; with scale "mean" (ceil(numel / chunk_size), 2) fp32: the
            low and the high level.
        numel: number of elements of the dense vector.
        chunk_size: elements a chunk, a power of two in [32, 8192].
        bits: 8, 4 or 2.
        scale: "max", or "mean" where bits is 2.
    """

    codes: Tensor
    scales: Tensor
    numel: int
    chunk_size: int
    bits: int
    scale: str

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "quantize"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.codes, self.scales

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class SeededValues(NamedTuple):
    """Entries of a vector at k places that follow from (seed, numel, k): see docs/kernels/random_k.md.

    Attributes:
        values: (k,) fp32, bf16 or fp16, in the order of their indices; 1 <= k <= numel, 0 if numel is 0.
        seed: an int in [-2**63, 2**63). Collectives do not send it: their ranks know it.
        numel: number of elements of the dense vector.
    """

    values: Tensor
    seed: int
    numel: int

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "random_k"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return (self.values,)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


class LowRankFactors(NamedTuple):
    """Two thin matrices, whose product left^T right is the matrix that a vector is taken for, row by row.

    It has ceil(numel / columns) rows, whose last one may be cut short by the end of the vector.

    Attributes:
        left: (rank, rows) fp32, orthonormal rows, the columns of the paper's P; zeros in place of one that
            is all but a combination of those before it. 1 <= rank <= min(64, rows, columns), 0 if numel is 0.
        right: (rank, columns) fp32.
        numel: number of elements of the dense vector.
        columns: elements of a row of the matrix, in [1, min(numel, 2**31 - 1)], 0 if numel is 0.
    """

    left: Tensor
    right: Tensor
    numel: int
    columns: int

    @property
    def compressor(self) -> str:
        """Registry name of the compressor that makes and decodes this payload."""
        return "low_rank"

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors that travel, in the order of the wire body."""
        return self.left, self.right

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, alignment padding included."""
        return layout_of(*self.fields).nbytes


Payload: TypeAlias = (
    SparseGrad | CodedSparse | PackedSigns | ChunkSparse | Quantized | SeededValues | LowRankFactors
)

INDEX_LIMIT = 2**31 - 1


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of indices into a vector of `numel` elements: int32 while it can hold them."""
    return torch.int32 if numel <= INDEX_LIMIT else torch.int64
