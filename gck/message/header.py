"""The 64 bytes in front of a payload's body, version 1. Byte by byte: docs/wire-format.md."""

from __future__ import annotations

import struct
from typing import NamedTuple

from gck.errors import CorruptPayloadError, PayloadVersionError

__all__ = ["CHECKSUM", "HEADER_NBYTES", "MEAN_SCALE", "MOST_NUMEL", "VERSION", "Header", "parse"]

STRUCT = struct.Struct("<4sBBBBBBHIQQqQQQ")
HEADER_NBYTES = STRUCT.size
MAGIC = b"GCKM"
VERSION = 1

# flags
CHECKSUM = 1  # the checksum field holds one
MEAN_SCALE = 2  # of quantized values: two levels a chunk
FLAGS = CHECKSUM | MEAN_SCALE

MOST_NUMEL = 2**63 - 1


class Header(NamedTuple):
    """The fields by the names that errors use; what a kind of payload does not have is 0.

    Attributes:
        compressor: id of the kind of payload, see `gck.message.formats`.
        dtype: of the values: 1 fp32, 2 bf16, 3 fp16, 0 codes of `bits` bits.
        index_codec: 0 none, 1 int32, 2 int64, 3 uint16 in a chunk, 4 12 bits in a chunk,
            5 block16, 6 Elias-Fano.
        bits: of a value.
        flags: `CHECKSUM`, `MEAN_SCALE`.
        chunk_size: elements of a chunk; of low rank, of a row of the matrix.
        numel: elements of the dense vector.
        k: entries that travel; of chunk top-k, of each chunk; of low rank, its rank.
        seed: of random-k.
        body_nbytes: what follows the header.
        checksum: xxh3_64 of header and body with this field 0; 0 where `flags` says that there is none.
    """

    compressor: int
    dtype: int
    index_codec: int
    bits: int
    flags: int
    chunk_size: int
    numel: int
    k: int
    seed: int
    body_nbytes: int
    checksum: int = 0

    @property
    def nbytes(self) -> int:
        """Of the whole message."""
        return HEADER_NBYTES + self.body_nbytes

    def pack(self) -> bytes:
        return STRUCT.pack(
            MAGIC,
            VERSION,
            self.compressor,
            self.dtype,
            self.index_codec,
            self.bits,
            0,
            self.flags,
            self.chunk_size,
            self.numel,
            self.k,
            self.seed,
            self.body_nbytes,
            0,
            self.checksum,
        )


def parse(function: str, data: memoryview) -> Header:
    """The header at the start of `data`, as far as it can be told right without knowing the compressor.

    Raises:
        PayloadVersionError: a version that this gck does not know.
        CorruptPayloadError: fewer than 64 bytes, another magic, unknown flags, a field out of range.
    """
    if len(data) < HEADER_NBYTES:
        raise CorruptPayloadError(
            f"{function}: a message starts with a header of {HEADER_NBYTES} bytes, got {len(data)} bytes"
        )
    magic, version, *fields = STRUCT.unpack_from(data)
    if magic != MAGIC:
        raise CorruptPayloadError(f"{function}: header: magic must be {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise PayloadVersionError(
            f"{function}: header: the message is of version {version}, this gck reads version {VERSION}"
        )
    compressor, dtype, codec, bits, byte_9, flags, chunk_size, numel, k, seed, nbytes, end, checksum = fields
    header = Header(compressor, dtype, codec, bits, flags, chunk_size, numel, k, seed, nbytes, checksum)
    if byte_9 or end:
        raise CorruptPayloadError(
            f"{function}: header: bytes 9 and [48, 56) are reserved and must be 0, got {byte_9} and {end}"
        )
    if flags & ~FLAGS:
        raise CorruptPayloadError(f"{function}: header: flags must be of {FLAGS:#06x}, got {flags:#06x}")
    if header.numel > MOST_NUMEL:
        raise CorruptPayloadError(f"{function}: header: numel must be below 2**63, got {header.numel}")
    if header.checksum and not flags & CHECKSUM:
        raise CorruptPayloadError(
            f"{function}: header: checksum must be 0 where flags have none, got {header.checksum:#018x}"
        )
    return header
