"""What can be told wrong about indices that a codec wrote (docs/index_codecs.md); all tensors are on the CPU.

They are looked at a block at a time: temporary memory is bounded by the size of the fields, or by a few MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gck.coded_layout import BLOCK, elias_fano_bits
from gck.errors import CorruptPayloadError
from gck.message.contents import check_tail

__all__ = ["check_block16", "check_elias_fano"]

# What is looked at together: so few that torch starts no threads, for which steps like these are too short.
ENTRIES = 1 << 14
STRING_NBYTES = 1 << 11  # of upper bits
WIDTHS = torch.uint8, torch.int16, torch.int32, torch.int64


def check_block16(low: Tensor, ends: Tensor, numel: int) -> None:
    """k >= 1 positions in blocks, and how many there are up to each block's end, are ascending indices."""
    k, blocks = low.numel(), ends.numel()
    _check_ends(ends, k)
    # As signed integers, which torch compares, 2**15 less: in the same order.
    signed = low.view(torch.int16)
    for start in range(0, k - 1, ENTRIES):
        positions = signed[start : start + ENTRIES + 1] ^ -(1 << 15)
        # What does not lie behind the entry before must be the first of a block. Blocks have one each, so
        # that of more than there are blocks one is wrong, and others need no look.
        first = (positions[1:] <= positions[:-1]).nonzero().view(-1)[:blocks].to(ends.dtype) + (start + 1)
        bad = first[ends[torch.searchsorted(ends, first)] != first]
        if bad.numel():
            raise CorruptPayloadError(
                f"indices must ascend strictly within each block, got {int(low[int(bad[0])])} after "
                f"{int(low[int(bad[0]) - 1])} at position {int(bad[0])}"
            )
    rest, last = numel - (blocks - 1) * BLOCK, int(low[-1])
    if last >= rest and (blocks == 1 or int(ends[-2]) < k):
        raise CorruptPayloadError(f"indices in the last block must be below {rest}, got {last}")


def _check_ends(ends: Tensor, k: int) -> None:
    falls = ends[1:] < ends[:-1]
    if int(ends[0]) < 0:
        block = 0
    elif falls.any():
        block = int(falls.view(torch.uint8).argmax()) + 1
    elif int(ends[-1]) != k:
        block = ends.numel() - 1
    else:
        return
    raise CorruptPayloadError(
        f"ends of blocks must ascend from 0 to k={k}, got {int(ends[block])} of block {block}"
    )


def check_elias_fano(low: Tensor, high: Tensor, numel: int, k: int) -> None:
    """Strings of lower and of upper bits are k >= 1 indices that ascend strictly below numel."""
    low_bits, high_bits = elias_fano_bits(numel, k)
    check_tail("lower bits", low, k * low_bits)
    check_tail("upper bits", high, high_bits)
    done, last = 0, 0  # entries, and the place of the last one in the string of upper bits
    for start in range(0, high.numel(), STRING_NBYTES):
        octets = high[start : start + STRING_NBYTES + 1]
        bits = (octets.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(torch.bool)
        # And the first bit behind them.
        bits = pad(bits.view(-1), (0, 1))[: 8 * STRING_NBYTES + 1]
        # Of each entry, whether the next one follows at once: its upper bits are then the same.
        alike = bits[1:].masked_select(bits[:-1])
        if not alike.numel():
            continue
        if done + alike.numel() > k:
            raise CorruptPayloadError(f"upper bits must be of k={k} indices, got more")
        lower = _lower(low, low_bits, done, done + alike.numel() + 1)
        alike &= lower[1:] <= lower[:-1]
        if alike.any():
            position = done + int(alike.view(torch.uint8).argmax()) + 1
            raise CorruptPayloadError(f"indices must ascend strictly, not so at position {position}")
        done += alike.numel()
        if done == k:
            string = int.from_bytes(bytes(octets[:STRING_NBYTES].tolist()), "little")
            last = 8 * start + string.bit_length() - 1
    if done < k:
        raise CorruptPayloadError(f"upper bits must be of k={k} indices, got {done}")
    index = (last - (k - 1) << low_bits) + int(_lower(low, low_bits, k - 1, k)[0])
    if index >= numel:
        raise CorruptPayloadError(f"indices must be below {numel}, got {index} at position {k - 1}")


def _lower(low: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Lower bits of the entries from `start` to `stop`, as integers; 0 of those that there are not."""
    if not bits:
        return torch.zeros(stop - start, dtype=torch.uint8)
    # Eight entries fill `bits` bytes, and in each eight the same bytes have a part in the i-th one.
    first, end = start // 8, -(-stop // 8)
    octets = low[first * bits : end * bits]
    octets = pad(octets, (0, (end - first) * bits - octets.numel())).view(-1, bits)
    dtype = torch.uint8 if bits == 8 else next(each for each in WIDTHS if bits < 8 * each.itemsize)
    lower = torch.zeros(end - first, 8, dtype=dtype)
    for i in range(8):
        for byte in range(i * bits // 8, -(-(i + 1) * bits // 8)):
            part, shift = octets[:, byte].to(dtype, copy=True), 8 * byte - i * bits
            lower[:, i] |= (
                part.bitwise_left_shift_(shift) if shift >= 0 else part.bitwise_right_shift_(-shift)
            )
    lower &= (1 << bits) - 1
    return lower.view(-1)[start - 8 * first : stop - 8 * first]
