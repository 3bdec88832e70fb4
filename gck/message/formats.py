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

from gck.errors import CorruptPayloadError, DtypeError
from gck.message import contents
from gck.message.header import CHECKSUM, MEAN_SCALE, Header
from gck.payload import ChunkSparse, PackedSigns, Payload, Quantized, SeededValues, SparseGrad
from gck.wire import Layout

__all__ = ["FORMATS", "OPTIONS", "Format", "checked", "format_of"]

# Codes of header fields. They are part of the format: never changed, never used again.
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
CODES_OF_BITS = 0
BITS = {1: 32, 2: 16, 3: 16}
INT32, INT64, UINT16, TWELVE_BITS = 1, 2, 3, 4
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


FORMATS: dict[int, Format] = {
    each.id: each
    for each in (SparseFormat(), SignsFormat(), ChunkSparseFormat(), QuantizedFormat(), SeededFormat())
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
