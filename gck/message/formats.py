"""What each kind of payload looks like as a message: its header, the fields of its body, its rules.

One class a kind. A format's rules on options are those of the compressor that makes the payload; they are
said again here because this module lies below the compressors, and may not trust a peer to have used one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gck.coded_layout import INDEX_CODECS, RUN, index_fields
from gck.errors import CorruptPayloadError, DtypeError
from gck.message import coded_indices, contents
from gck.message.header import CHECKSUM, MEAN_SCALE, Header
from gck.payload import (
    MOST_COLUMNS,
    MOST_RANK,
    ChunkSparse,
    CodedSparse,
    LowRankFactors,
    PackedSigns,
    Payload,
    Quantized,
    SeededValues,
    SparseGrad,
    index_dtype,
)
from gck.wire import Layout

__all__ = ["FORMATS", "OPTIONS", "Format", "checked", "format_of"]

# Codes of header fields. They are part of the format: never changed, never used again.
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
FP32 = {1: torch.float32}
CODES_OF_BITS = 0
BITS = {1: 32, 2: 16, 3: 16}
INT32, INT64, UINT16, TWELVE_BITS, BLOCK16, ELIAS_FANO = range(1, 7)
INDEX_DTYPES = {INT32: torch.int32, INT64: torch.int64, UINT16: torch.uint16, TWELVE_BITS: torch.uint8}

# Header fields that a kind of payload may have or not.
OPTIONS = "dtype", "index_codec", "bits", "flags", "chunk_size", "k", "seed"

Fields = tuple[Tensor, ...]
Shape = tuple[torch.dtype, tuple[int, ...]]


def _powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(low.bit_length() - 1, high.bit_length()))


class Format(ABC):
    """How one kind of payload travels."""

    id: ClassVar[int]  # in the header
    kind: ClassVar[type[Any]]

    @abstractmethod
    def options(self, payload: Any) -> dict[str, int]:
        """The header's fields, but for flags of the message, numel and sizes."""

    @abstractmethod
    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        """Header field -> the values that it may have, given those before it. Fields not named are 0."""

    @abstractmethod
    def shapes(self, header: Header) -> tuple[Shape, ...]:
        """Dtype and shape of each field, of a header whose fields are allowed."""

    @abstractmethod
    def check(self, header: Header, fields: Fields) -> None:
        """Raises CorruptPayloadError, without the name of a function, if the fields cannot be right."""

    @abstractmethod
    def payload(self, header: Header, fields: Fields) -> Payload: ...

    def layout(self, header: Header) -> Layout:
        counts = []
        for dtype, shape in self.shapes(header):
            count = 1
            for size in shape:
                count *= size
            counts.append((dtype, count))
        return Layout.of(*counts)


class SparseFormat(Format):
    id, kind = 1, SparseGrad

    def options(self, payload: SparseGrad) -> dict[str, int]:
        dtype = _code("values", DTYPES, payload.values.dtype)
        pair = {INT32: torch.int32, INT64: torch.int64}
        codec = _code("indices", pair, payload.indices.dtype)
        return {"dtype": dtype, "bits": BITS[dtype], "index_codec": codec, "k": payload.values.numel()}

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        return {
            "dtype": tuple(DTYPES),
            "index_codec": (INT32, INT64),
            "bits": (BITS.get(header.dtype, 0),),
            "k": range(header.numel + 1),
        }

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        return (DTYPES[header.dtype], (header.k,)), (INDEX_DTYPES[header.index_codec], (header.k,))

    def check(self, header: Header, fields: Fields) -> None:
        contents.check_ascending(fields[1], header.numel)

    def payload(self, header: Header, fields: Fields) -> SparseGrad:
        return SparseGrad(fields[0], fields[1], header.numel)


class SignsFormat(Format):
    id, kind = 2, PackedSigns

    def options(self, payload: PackedSigns) -> dict[str, int]:
        return {"bits": 1, "chunk_size": payload.chunk_size}

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        return {"bits": (1,), "chunk_size": _powers(32, 8192)}

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        words, chunks = -(-header.numel // 32), -(-header.numel // header.chunk_size)
        return (torch.uint32, (words,)), (torch.float32, (chunks,))

    def check(self, header: Header, fields: Fields) -> None:
        contents.check_tail("words", fields[0], header.numel)
        contents.check_scales(fields[1])

    def payload(self, header: Header, fields: Fields) -> PackedSigns:
        return PackedSigns(fields[0], fields[1], header.numel, header.chunk_size)


class ChunkSparseFormat(Format):
    id, kind = 3, ChunkSparse

    def options(self, payload: ChunkSparse) -> dict[str, int]:
        pair = {UINT16: torch.uint16, TWELVE_BITS: torch.uint8}
        return {
            "dtype": {32: 1, 16: 2}.get(payload.value_bits, CODES_OF_BITS),
            "index_codec": _code("indices", pair, payload.indices.dtype),
            "bits": payload.value_bits,
            "chunk_size": payload.chunk_size,
            "k": payload.k,
        }

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        twelve = (TWELVE_BITS,) if header.chunk_size <= 4096 else ()
        return {
            "bits": (32, 16, 8, 4, 2),
            "dtype": ({32: 1, 16: 2}.get(header.bits, CODES_OF_BITS),),
            "chunk_size": _powers(32, 65536),
            "index_codec": (UINT16, *twelve),
            "k": range(1, header.chunk_size // 2 + 1),
        }

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        chunks, k, bits = -(-header.numel // header.chunk_size), header.k, header.bits
        coded = bits <= 8
        values = -(-k * bits // 8) if coded else k
        scales = (2 if bits == 2 else 1) if coded else 0
        indices = -(-k * 12 // 8) if header.index_codec == TWELVE_BITS else k
        return (
            (DTYPES.get(header.dtype, torch.uint8), (chunks, values)),
            (torch.float32, (chunks, scales)),
            (INDEX_DTYPES[header.index_codec], (chunks, indices)),
        )

    def check(self, header: Header, fields: Fields) -> None:
        values, scales, indices = fields
        if not header.numel:
            return
        # A last chunk of fewer than k elements leaves the end of its row unused.
        rest = header.numel - (values.shape[0] - 1) * header.chunk_size
        contents.check_rows("values", values, header.k * header.bits, min(rest, header.k) * header.bits)
        contents.check_scales(scales)
        bits = 12 if header.index_codec == TWELVE_BITS else 16
        contents.check_rows("indices", indices, header.k * bits, min(rest, header.k) * bits)
        contents.check_ascending_rows(indices, header.k, bits, header.chunk_size, rest)

    def payload(self, header: Header, fields: Fields) -> ChunkSparse:
        values, scales, indices = fields
        return ChunkSparse(values, scales, indices, header.numel, header.chunk_size, header.k, header.bits)


class QuantizedFormat(Format):
    id, kind = 4, Quantized

    def options(self, payload: Quantized) -> dict[str, int]:
        if payload.scale not in ("max", "mean"):
            raise CorruptPayloadError(f'payload.scale must be "max" or "mean", got {payload.scale!r}')
        flags = MEAN_SCALE if payload.scale == "mean" else 0
        return {"bits": payload.bits, "flags": flags, "chunk_size": payload.chunk_size}

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        flags = (0, MEAN_SCALE) if header.bits == 2 else (0,)
        return {"bits": (8, 4, 2), "flags": flags, "chunk_size": _powers(32, 8192)}

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        chunks = -(-header.numel // header.chunk_size)
        scales = (chunks, 2) if header.flags & MEAN_SCALE else (chunks,)
        return (torch.uint8, (-(-header.numel * header.bits // 8),)), (torch.float32, scales)

    def check(self, header: Header, fields: Fields) -> None:
        contents.check_tail("codes", fields[0], header.numel * header.bits)
        contents.check_scales(fields[1])

    def payload(self, header: Header, fields: Fields) -> Quantized:
        scale = "mean" if header.flags & MEAN_SCALE else "max"
        codes, scales = fields
        return Quantized(codes, scales, header.numel, header.chunk_size, header.bits, scale)


class SeededFormat(Format):
    id, kind = 5, SeededValues

    def options(self, payload: SeededValues) -> dict[str, int]:
        dtype = _code("values", DTYPES, payload.values.dtype)
        return {"dtype": dtype, "bits": BITS[dtype], "k": payload.values.numel(), "seed": payload.seed}

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        return {
            "dtype": tuple(DTYPES),
            "bits": (BITS.get(header.dtype, 0),),
            "k": range(min(header.numel, 1), header.numel + 1),
            "seed": range(-(2**63), 2**63),
        }

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        return ((DTYPES[header.dtype], (header.k,)),)

    def check(self, header: Header, fields: Fields) -> None:
        """Every bit pattern is a value."""

    def payload(self, header: Header, fields: Fields) -> SeededValues:
        return SeededValues(fields[0], header.seed, header.numel)


class CodedSparseFormat(Format):
    id, kind = 6, CodedSparse

    def options(self, payload: CodedSparse) -> dict[str, int]:
        if payload.index_codec not in INDEX_CODECS:
            raise CorruptPayloadError(
                f"payload.index_codec must be one of {INDEX_CODECS}, got {payload.index_codec!r}"
            )
        codecs = {"int32": self._plain_codec(payload.numel), "block16": BLOCK16, "elias_fano": ELIAS_FANO}
        dtype = CODES_OF_BITS if payload.value_bits else _code("values", DTYPES, payload.values.dtype)
        bits = payload.value_bits or BITS[dtype]
        return {"dtype": dtype, "bits": bits, "index_codec": codecs[payload.index_codec], "k": payload.k}

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        return {
            "dtype": (*DTYPES, CODES_OF_BITS),
            "index_codec": (self._plain_codec(header.numel), BLOCK16, ELIAS_FANO),
            "bits": (BITS[header.dtype],) if header.dtype in BITS else (8, 4),
            "k": range(min(header.numel, 1), header.numel + 1),
        }

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        k, coded = header.k, header.dtype == CODES_OF_BITS
        low, high = index_fields(self._codec(header), header.numel, k)
        return (
            (DTYPES.get(header.dtype, torch.uint8), (-(-k * header.bits // 8) if coded else k,)),
            (torch.float32, (-(-k // RUN) if coded else 0,)),
            (low[0], (low[1],)),
            (high[0], (high[1],)),
        )

    def check(self, header: Header, fields: Fields) -> None:
        values, scales, low, high = fields
        contents.check_tail("values", values, header.k * header.bits)
        contents.check_scales(scales)
        if not header.k:
            return
        if header.index_codec == BLOCK16:
            coded_indices.check_block16(low, high, header.numel)
        elif header.index_codec == ELIAS_FANO:
            coded_indices.check_elias_fano(low, high, header.numel, header.k)
        else:
            contents.check_ascending(low, header.numel)

    def payload(self, header: Header, fields: Fields) -> CodedSparse:
        values, scales, low, high = fields
        bits = header.bits if header.dtype == CODES_OF_BITS else 0
        return CodedSparse(values, scales, low, high, header.numel, header.k, self._codec(header), bits)

    @staticmethod
    def _plain_codec(numel: int) -> int:
        return INT32 if index_dtype(numel) == torch.int32 else INT64

    @staticmethod
    def _codec(header: Header) -> str:
        return {BLOCK16: "block16", ELIAS_FANO: "elias_fano"}.get(header.index_codec, "int32")


class LowRankFormat(Format):
    """Of `chunk_size`, columns of the matrix, and `k`, its rank, all else follows."""

    id, kind = 7, LowRankFactors

    def options(self, payload: LowRankFactors) -> dict[str, int]:
        dtype = _code("left", FP32, payload.left.dtype)
        _code("right", FP32, payload.right.dtype)
        for name, field in (("left", payload.left), ("right", payload.right)):
            if field.dim() != 2:
                raise CorruptPayloadError(f"payload.{name} must be a matrix, got shape {tuple(field.shape)}")
        return {
            "dtype": dtype,
            "bits": BITS[dtype],
            "chunk_size": payload.columns,
            "k": payload.left.shape[0],
        }

    def allowed(self, header: Header) -> dict[str, Sequence[int]]:
        least, most = min(header.numel, 1), min(header.numel, MOST_COLUMNS)
        # Not of a chunk_size out of range: that is refused before k is looked at.
        rank = min(MOST_RANK, self._rows(header), max(header.chunk_size, least))
        return {
            "dtype": tuple(FP32),
            "bits": (BITS[1],),
            "chunk_size": range(least, most + 1),
            "k": range(least, rank + 1),
        }

    def shapes(self, header: Header) -> tuple[Shape, ...]:
        return (
            (torch.float32, (header.k, self._rows(header))),
            (torch.float32, (header.k, header.chunk_size)),
        )

    def check(self, header: Header, fields: Fields) -> None:
        """Every bit pattern is a value."""

    def payload(self, header: Header, fields: Fields) -> LowRankFactors:
        return LowRankFactors(fields[0], fields[1], header.numel, header.chunk_size)

    @staticmethod
    def _rows(header: Header) -> int:
        return -(-header.numel // max(header.chunk_size, 1))


FORMATS: dict[int, Format] = {
    each.id: each
    for each in (
        SparseFormat(),
        SignsFormat(),
        ChunkSparseFormat(),
        QuantizedFormat(),
        SeededFormat(),
        CodedSparseFormat(),
        LowRankFormat(),
    )
}


def format_of(payload: object) -> Format | None:
    """The format of a payload's kind; None of anything else."""
    return next((each for each in FORMATS.values() if isinstance(payload, each.kind)), None)


def checked(function: str, header: Header) -> tuple[Format, Layout]:
    """The format of a header and the layout of its body, if its fields are allowed and agree.

    Raises:
        CorruptPayloadError: they do not; names the field.
    """
    each = FORMATS.get(header.compressor)
    if each is None:
        known = ", ".join(map(str, FORMATS))
        raise CorruptPayloadError(
            f"{function}: header: compressor must be one of {known}, got {header.compressor}"
        )
    allowed = each.allowed(header)
    flags_of_kind = header.flags & ~CHECKSUM
    for name in (*allowed, *(option for option in OPTIONS if option not in allowed)):
        value, values = flags_of_kind if name == "flags" else getattr(header, name), allowed.get(name, (0,))
        if value not in values:
            said = f"in [{values[0]}, {values[-1]}]" if isinstance(values, range) else f"one of {values}"
            raise CorruptPayloadError(
                f"{function}: header: {name} of a {each.kind.__name__} must be {said}, got {value}"
            )
    layout = each.layout(header)
    if layout.nbytes != header.body_nbytes:
        raise CorruptPayloadError(
            f"{function}: header: body_nbytes of a {each.kind.__name__} of {header.numel} elements with "
            f"these options must be {layout.nbytes}, got {header.body_nbytes}"
        )
    return each, layout


def _code(name: str, codes: dict[int, torch.dtype], dtype: torch.dtype) -> int:
    for code, known in codes.items():
        if known == dtype:
            return code
    raise DtypeError(f"payload.{name} must be one of {list(codes.values())}, got {dtype}")
