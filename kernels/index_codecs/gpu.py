"""Index codecs on the GPU: no atomics but an OR of bits, whose order does not matter, and no host sync.

Elias-Fano. Encoding: a word of lower bits is gathered from the entries that have a part in it; upper bits are
set one by one. Decoding: the ones in each block of words are counted, a scan makes the counts ranks, and a
program finds the entries of a block by a scan of its bits. Block 16. Encoding: where a block ends is found by
binary search. Decoding: a program has a block.

Whatever bytes are decoded, nothing is read or written out of bounds, and no program takes much longer: an
index that is not below numel, or that is missing, comes out as numel, which decoders of payloads skip.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.coded_layout import BLOCK, elias_fano_bits
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.packing import unpack_bits

ENTRIES = 1024  # a program of what has one entry a lane
WORDS = 128  # of lower bits, of 64 bits each, a program
SELECT_WORDS = 32  # of upper bits, of 32 bits each, a program: so many bits are scanned together
COUNT_BLOCKS = 32  # of SELECT_WORDS each, a program
ENDS = 128  # blocks a program searches the ends of
JOINED = 1024  # entries of a block at a time
WARPS = 4


@triton.jit(do_not_specialize=["k", "low_bits", "words", "steps"])
def low_kernel(p_indices, p_low, k, low_bits, words, steps, WORDS: tl.constexpr):
    """The words of lower bits; `steps` entries at most have a part in one."""
    b_word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    b_bit = b_word * 64
    b_first = b_bit // low_bits
    mask = (tl.cast(1, tl.int64) << low_bits) - 1
    b_bits = tl.zeros((WORDS,), tl.int64)
    for step in range(steps):
        b_entry = b_first + step
        b_shift = b_entry * low_bits - b_bit  # from the word's first bit to the entry's
        b_here = (b_entry < k) & (b_shift < 64) & (b_word < words)
        b_low = tl.load(p_indices + b_entry, mask=b_here, other=0).to(tl.int64) & mask
        b_up = tl.where(b_here & (b_shift > 0), b_shift, 0)
        b_down = tl.where(b_here & (b_shift < 0), -b_shift, 0)
        b_bits |= (b_low >> b_down) << b_up
    tl.store(p_low + b_word, b_bits, mask=b_word < words)


@triton.jit(do_not_specialize=["k", "low_bits", "high_bits"])
def high_kernel(p_indices, p_high, k, low_bits, high_bits, ENTRIES: tl.constexpr):
    """Sets the upper bits, in words of 32 bits that are 0."""
    b_entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    b_index = tl.load(p_indices + b_entry, mask=b_entry < k, other=-1).to(tl.int64)
    b_place = (b_index >> low_bits) + b_entry
    # Of indices that ascend within the vector, all are.
    b_inside = (b_index >= 0) & (b_place >= 0) & (b_place < high_bits)
    b_bit = (tl.full((ENTRIES,), 1, tl.int64) << (b_place & 31)).to(tl.int32)
    tl.atomic_or(p_high + (b_place >> 5), b_bit, mask=b_inside, sem="relaxed")


@triton.jit(do_not_specialize=["words", "blocks", "row_units"])
def count_kernel(p_high, p_counts, words, blocks, row_units, WORDS: tl.constexpr, BLOCKS: tl.constexpr):
    """Ones in each block of WORDS words of each rank, as (ranks, blocks)."""
    i_rank = tl.program_id(1).to(tl.int64)
    b_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    b_word = b_block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    p_word = p_high + i_rank * row_units * 4 + b_word
    b_x = tl.load(p_word, mask=b_word < words, other=0).to(tl.uint32, bitcast=True)
    # Sums of neighbours, twice as wide each time.
    b_x -= (b_x >> 1) & 0x55555555
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    b_x += b_x >> 8
    b_ones = ((b_x + (b_x >> 16)) & 0x3F).to(tl.int32)
    tl.store(p_counts + i_rank * blocks + b_block, tl.sum(b_ones, 1), mask=b_block < blocks)


@triton.jit(do_not_specialize=["k", "n", "low_bits", "low_words", "words", "blocks", "row_units", "out_row"])
def select_kernel(
    p_high,
    p_low,
    p_stops,
    p_out,
    k,
    n,
    low_bits,
    low_words,
    words,
    blocks,
    row_units,
    out_row,
    WORDS: tl.constexpr,
):
    """The indices whose ones are in a block of WORDS words of 32 bits. p_stops: ones to the end of each."""
    i_block = tl.program_id(0).to(tl.int64)
    i_rank = tl.program_id(1).to(tl.int64)
    p_high += i_rank * row_units * 4
    p_low += i_rank * row_units * 2
    p_stops += i_rank * blocks
    p_out += i_rank * out_row
    start = tl.load(p_stops + i_block - 1, mask=i_block > 0, other=0)
    b_word = i_block * WORDS + tl.arange(0, WORDS)
    b_one = unpack_bits(tl.load(p_high + b_word, mask=b_word < words, other=0))
    b_one = tl.reshape(b_one, (WORDS * 32,))
    b_rank = start + tl.cumsum(b_one, 0) - 1
    b_here = (b_one != 0) & (b_rank < k)
    b_high = i_block * (WORDS * 32) + tl.arange(0, WORDS * 32) - b_rank
    b_bit = tl.where(b_here, b_rank, 0) * low_bits
    b_at, b_shift = b_bit >> 6, b_bit & 63
    b_word_0 = tl.load(p_low + b_at, mask=b_here & (b_at < low_words), other=0).to(tl.uint64, bitcast=True)
    b_next = b_here & (b_shift + low_bits > 64) & (b_at + 1 < low_words)
    b_word_1 = tl.load(p_low + b_at + 1, mask=b_next, other=0).to(tl.uint64, bitcast=True)
    # In two steps, because no shift may be by 64.
    b_low = (b_word_0 >> b_shift.to(tl.uint64)) | ((b_word_1 << 1) << (63 - b_shift).to(tl.uint64))
    b_low = b_low.to(tl.int64, bitcast=True) & ((tl.cast(1, tl.int64) << low_bits) - 1)
    b_index = (b_high << low_bits) | b_low
    b_index = tl.where((b_index >= 0) & (b_index < n), b_index, n)
    tl.store(p_out + b_rank, b_index.to(p_out.dtype.element_ty), mask=b_here)


@triton.jit(do_not_specialize=["k"])
def split_kernel(p_indices, p_locals, k, ENTRIES: tl.constexpr):
    b_entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    b_index = tl.load(p_indices + b_entry, mask=b_entry < k, other=0)
    tl.store(p_locals + b_entry, b_index.to(tl.int16), mask=b_entry < k)


@triton.jit(do_not_specialize=["k", "steps", "blocks"])
def ends_kernel(p_indices, p_ends, k, steps, blocks, SIZE: tl.constexpr, ENDS: tl.constexpr):
    """How many entries lie below the end of each block of SIZE elements."""
    b_block = tl.program_id(0).to(tl.int64) * ENDS + tl.arange(0, ENDS)
    b_stop = (b_block + 1) * SIZE
    b_low = tl.zeros((ENDS,), tl.int64)
    b_high = tl.zeros((ENDS,), tl.int64) + k
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        b_looks = b_low < b_high
        b_index = tl.load(p_indices + b_middle, mask=b_looks, other=0).to(tl.int64)
        b_below = b_looks & (b_index < b_stop)
        b_low = tl.where(b_below, b_middle + 1, b_low)
        b_high = tl.where(b_looks & (b_below == 0), b_middle, b_high)
    tl.store(p_ends + b_block, b_low.to(p_ends.dtype.element_ty), mask=b_block < blocks)


@triton.jit(do_not_specialize=["k", "n", "row_units", "out_row"])
def join_kernel(
    p_ends,
    p_locals,
    p_out,
    k,
    n,
    row_units,
    out_row,
    SIZE: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The indices of a block of SIZE elements."""
    i_block = tl.program_id(0).to(tl.int64)
    i_rank = tl.program_id(1).to(tl.int64)
    p_ends += i_rank * row_units * (16 // INDEX_BYTES)
    p_locals += i_rank * row_units * 8
    p_out += i_rank * out_row
    begin = tl.load(p_ends + i_block - 1, mask=i_block > 0, other=0).to(tl.int64)
    begin = tl.maximum(begin, 0)
    # A block has no more entries than elements, whatever its end says.
    stop = tl.minimum(tl.minimum(tl.load(p_ends + i_block).to(tl.int64), begin + SIZE), k)
    for first in range(begin, stop, JOINED):
        b_entry = first + tl.arange(0, JOINED)
        b_local = tl.load(p_locals + b_entry, mask=b_entry < stop, other=0).to(tl.int64) & 0xFFFF
        b_index = i_block * SIZE + b_local
        b_index = tl.where(b_index < n, b_index, n)
        tl.store(p_out + b_entry, b_index.to(p_out.dtype.element_ty), mask=b_entry < stop)


def encode_(codec: str, indices: Tensor, numel: int, fields: Sequence[Tensor]) -> None:
    """Fields of k >= 1 indices."""
    k = indices.numel()
    if codec == "block16":
        locals_, ends = fields[0].view(torch.int16), fields[1]
        with launching_on(indices):
            split_kernel[(triton.cdiv(k, ENTRIES),)](
                indices, locals_, k, ENTRIES=ENTRIES, num_warps=WARPS, **EXACT
            )
            ends_kernel[(triton.cdiv(ends.numel(), ENDS),)](
                *(indices, ends, k, k.bit_length(), ends.numel()),
                SIZE=BLOCK,
                ENDS=ENDS,
                num_warps=WARPS,
                **EXACT,
            )
        return
    low_bits, high_bits = elias_fano_bits(numel, k)
    low, high = (_aligned(field) for field in fields)
    high.zero_()
    with launching_on(indices):
        if low_bits:
            words = low.numel() // 8
            low_kernel[(triton.cdiv(words, WORDS),)](
                *(indices, low.view(torch.int64), k, low_bits, words, 64 // low_bits + 2),
                WORDS=WORDS,
                num_warps=WARPS,
                **EXACT,
            )
        high_kernel[(triton.cdiv(k, ENTRIES),)](
            *(indices, high.view(torch.int32), k, low_bits, high_bits),
            ENTRIES=ENTRIES,
            num_warps=WARPS,
            **EXACT,
        )
    for field, written in zip(fields, (low, high), strict=True):
        if written is not field:
            field.copy_(written)


def decode_(codec: str, fields: Sequence[Tensor], numel: int, out: Tensor) -> None:
    """Indices of W >= 1 ranks, k >= 1 of each."""
    ranks, k = out.shape
    out.fill_(numel)
    low, high = (_aligned(field) for field in fields)
    if codec == "block16":
        with launching_on(out):
            join_kernel[(high.shape[1], ranks)](
                *(high, low.view(torch.int16), out, k, numel, _row_units(high), out.stride(0)),
                SIZE=BLOCK,
                INDEX_BYTES=high.element_size(),
                JOINED=JOINED,
                num_warps=WARPS,
                **EXACT,
            )
        return
    low_bits, _ = elias_fano_bits(numel, k)
    low_words = low.shape[1] // 8
    # Without lower bits, any address will do.
    low, high = (low if low_bits else high).view(torch.int64), high.view(torch.int32)
    words = high.shape[1]
    blocks = triton.cdiv(words, SELECT_WORDS)
    counts = torch.empty(ranks, blocks, dtype=torch.int32, device=out.device)
    with launching_on(out):
        count_kernel[(triton.cdiv(blocks, COUNT_BLOCKS), ranks)](
            *(high, counts, words, blocks, _row_units(high)),
            WORDS=SELECT_WORDS,
            BLOCKS=COUNT_BLOCKS,
            num_warps=WARPS,
            **EXACT,
        )
        stops = counts.cumsum(1, dtype=torch.int64)
        select_kernel[(blocks, ranks)](
            *(high, low, stops, out, k, numel, low_bits),
            *(low_words, words, blocks, _row_units(high), out.stride(0)),
            WORDS=SELECT_WORDS,
            num_warps=WARPS,
            **EXACT,
        )


def _aligned(field: Tensor) -> Tensor:
    """The field, or a copy, at an address that words of 64 bits can be read from; rows of bodies are."""
    return field.clone() if field.numel() and field.data_ptr() % 8 else field


def _row_units(rows: Tensor) -> int:
    """16 bytes from one row to the next."""
    return rows.stride(0) * rows.element_size() // 16 if len(rows) > 1 else 0
