"""How large the fields of `gck.CodedSparse` are: from the number of elements and k alone, so that all ranks
know. What is in them: docs/index_codecs.md."""

from __future__ import annotations

import torch

from gck.payload import index_dtype

__all__ = ["BLOCK", "INDEX_CODECS", "RUN", "elias_fano_bits", "index_fields"]

INDEX_CODECS = ("int32", "block16", "elias_fano")
BLOCK = 1 << 16  # elements whose positions 16 bits tell apart
# Entries with one scale, where values are codes: it adds a 16th of a bit to each.
RUN = 512


def elias_fano_bits(numel: int, k: int) -> tuple[int, int]:
    """(lower bits of each index, bits of the string that holds the upper ones), for 1 <= k <= numel."""
    low = (numel // k).bit_length() - 1
    return low, k + (numel >> low) + 1


def index_fields(codec: str, numel: int, k: int) -> tuple[tuple[torch.dtype, int], tuple[torch.dtype, int]]:
    """(dtype, count) of the two fields that k indices below `numel` become; 0 <= k <= numel.

    int32: the indices, int64 where numel > 2**31 - 1, and nothing. block16: (k,) uint16, the position in a
    block of 65,536 elements, and for each block the number of entries up to its end, as wide as an index.
    elias_fano: two strings of bits as uint8, the lower bits and the upper ones, of multiples of 8 bytes.
    """
    if codec == "int32":
        return (index_dtype(numel), k), (torch.uint8, 0)
    if codec == "block16":
        return (torch.uint16, k), (index_dtype(numel), -(-numel // BLOCK) if k else 0)
    if not k:
        return (torch.uint8, 0), (torch.uint8, 0)
    low, high_bits = elias_fano_bits(numel, k)
    return (torch.uint8, _whole_words(k * low)), (torch.uint8, _whole_words(high_bits))


def _whole_words(bits: int) -> int:
    """Bytes of so many bits, up to a multiple of 8."""
    return -(-bits // 64) * 8
