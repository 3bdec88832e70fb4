"""Exact top-k with error feedback on the GPU.

`stream` moves acc = grad + err into err and counts the exponents; three `refine` passes count the next
bits of the elements that share the bits found so far, most significant digit first, which gives the exact
key of the k-th largest element; `count` finds how many winners each program's run of tiles holds, and
`emit` writes them in order and leaves their rounding errors in err.

Every decision is taken on the device. A kernel takes the decision that its predecessor's counts imply by
itself, in each of its programs: that costs one small load, and spares both a launch and a ticket.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import INFINITY, accumulate, is_finite, magnitude_key, round_to, widen
from gck.kernels.common.launch import EXACT, MAX_PROGRAMS, launching_on, spans
from gck.kernels.common.tiles import load_tile, run_of_tiles, tile_offsets

TILE = 4096
EMIT_TILE = 2048  # needs more registers an element; divides TILE
BLOCK = 1024  # payload entries a program of the scatter
# Digits of the 31-bit key as (lowest bit, bits). Histograms of more than 256 bins cost some versions of
# Triton more time than the pass that they would save.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))
BINS = 256
# Control block, int64: a (key prefix, winners still to find among its keys) pair a digit, of which the
# last is the k-th key itself and the number of its ties that win; then a histogram a digit.
DECISION = tl.constexpr(2 * len(DIGITS))
HISTOGRAMS = tl.constexpr(2 * len(DIGITS) + 8)


@triton.jit
def _decide(p_control, DIGIT: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Extends the prefix by the digit that the histogram of DIGIT gives; program 0 notes the result."""
    prefix = tl.load(p_control + 2 * DIGIT)
    wanted = tl.load(p_control + 2 * DIGIT + 1)
    b_bin = tl.arange(0, BINS)
    b_count = tl.load(p_control + HISTOGRAMS + DIGIT * BINS + b_bin)
    b_at_least = tl.cumsum(b_count, 0, reverse=True)
    digit = tl.sum((b_at_least >= wanted).to(tl.int32), 0) - 1
    prefix |= digit.to(tl.int64) << SHIFT
    wanted -= tl.sum(tl.where(b_bin > digit, b_count, 0), 0)
    if tl.program_id(0) == 0:
        tl.store(p_control + 2 * DIGIT + 2, prefix)
        tl.store(p_control + 2 * DIGIT + 3, wanted)
    return prefix.to(tl.int32)


@triton.jit
def _add_histogram(p_control, b_count, DIGIT: tl.constexpr, BINS: tl.constexpr):
    b_bin = tl.arange(0, BINS)
    p_histogram = p_control + HISTOGRAMS + DIGIT * BINS
    tl.atomic_add(p_histogram + b_bin, b_count.to(tl.int64), mask=b_count > 0, sem="relaxed")


@triton.jit
def _stream_tile(p_grad, p_err, i_tile, n, TILE: tl.constexpr, BINS: tl.constexpr, WHOLE: tl.constexpr):
    b_offset = tile_offsets(i_tile, TILE)
    b_acc = accumulate(load_tile(p_grad, b_offset, n, WHOLE), load_tile(p_err, b_offset, n, WHOLE))
    b_digit = magnitude_key(b_acc) >> 23
    if WHOLE:
        tl.store(p_err + b_offset, b_acc)
        return tl.histogram(b_digit, BINS)
    else:
        tl.store(p_err + b_offset, b_acc, mask=b_offset < n)
        return tl.histogram(b_digit, BINS, mask=b_offset < n)


@triton.jit
def _refine_tile(
    p_source,
    i_tile,
    n,
    prefix,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    b_offset = tile_offsets(i_tile, TILE)
    b_key = magnitude_key(load_tile(p_source, b_offset, n, WHOLE))
    b_match = (b_key >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS))
    if not WHOLE:
        b_match &= b_offset < n
    return tl.histogram((b_key >> SHIFT) & ((1 << BITS) - 1), BINS, mask=b_match)


@triton.jit
def _classify(b_acc, b_offset, n, threshold, WHOLE: tl.constexpr):
    """1 for each element above the threshold, 65536 for each tie, else 0: one sum counts both."""
    b_key = magnitude_key(b_acc)
    b_class = tl.where(b_key > threshold, 1, tl.where(b_key == threshold, 65536, 0))
    if not WHOLE:
        b_class = tl.where(b_offset < n, b_class, 0)
    return b_class


@triton.jit
def _emit_tile(
    p_err,
    p_values,
    p_indices,
    p_nonfinite,
    i_tile,
    n,
    threshold,
    position,
    quota,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Writes the winners of a tile from `position` on; at most `quota` ties win. Returns both, moved."""
    b_offset = tile_offsets(i_tile, TILE)
    b_acc = load_tile(p_err, b_offset, n, WHOLE)
    b_class = _classify(b_acc, b_offset, n, threshold, WHOLE)
    both = tl.sum(b_class, 0)
    ties = tl.minimum((both >> 16).to(tl.int64), quota).to(tl.int32)
    # Infinities that lose to NaN are no winners, but must not stay in err.
    if (both > 0) | (threshold > INFINITY):
        b_rank = tl.cumsum(b_class, 0)  # one scan ranks both classes
        b_tie_rank = b_rank >> 16
        b_wins = (b_class == 1) | ((b_class > 1) & (b_tie_rank <= ties))
        b_slot = (b_rank & 0xFFFF) + tl.minimum(b_tie_rank, ties) - 1
        b_value = round_to(b_acc, p_values.dtype.element_ty)
        tl.store(p_values + position + b_slot, b_value, mask=b_wins)
        tl.store(p_indices + position + b_slot, b_offset.to(p_indices.dtype.element_ty), mask=b_wins)
        b_residual = tl.where(b_wins, b_acc - widen(b_value), b_acc)
        b_cleared = is_finite(b_residual) == 0
        if not WHOLE:
            b_cleared &= b_offset < n
        tl.store(p_err + b_offset, tl.where(b_cleared, 0.0, b_residual), mask=b_wins | b_cleared)
        cleared = tl.sum(b_cleared.to(tl.int32), 0)
        if cleared > 0:
            tl.atomic_add(p_nonfinite, cleared.to(tl.int64), sem="relaxed")
    return position + (both & 0xFFFF) + ties, quota - ties


@triton.jit(do_not_specialize=["n", "k", "tiles"])
def stream_kernel(p_grad, p_err, p_control, n, k, tiles, TILE: tl.constexpr, BINS: tl.constexpr):
    i_program = tl.program_id(0)
    if i_program == 0:
        tl.store(p_control + 1, tl.cast(k, tl.int64))
    first, whole, stop = run_of_tiles(i_program, tiles, n, TILE)
    b_count = tl.zeros((BINS,), tl.int32)
    for i_tile in range(first, whole):
        b_count += _stream_tile(p_grad, p_err, i_tile, n, TILE, BINS, True)
    if whole < stop:
        b_count += _stream_tile(p_grad, p_err, whole, n, TILE, BINS, False)
    _add_histogram(p_control, b_count, 0, BINS)


@triton.jit(do_not_specialize=["n", "tiles"])
def refine_kernel(
    p_source,
    p_control,
    n,
    tiles,
    DIGIT: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Counts digit DIGIT, the BITS bits from SHIFT on, of the keys that begin with the prefix so far."""
    prefix = _decide(p_control, DIGIT - 1, LAST_SHIFT, BINS)
    first, whole, stop = run_of_tiles(tl.program_id(0), tiles, n, TILE)
    b_count = tl.zeros((BINS,), tl.int32)
    for i_tile in range(first, whole):
        b_count += _refine_tile(p_source, i_tile, n, prefix, SHIFT, BITS, TILE, BINS, True)
    if whole < stop:
        b_count += _refine_tile(p_source, whole, n, prefix, SHIFT, BITS, TILE, BINS, False)
    _add_histogram(p_control, b_count, DIGIT, BINS)


@triton.jit(do_not_specialize=["n", "tiles"])
def count_kernel(
    p_source,
    p_control,
    p_counts,
    n,
    tiles,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Takes the last decision; counts what lies above it and ties with it in each program's run."""
    threshold = _decide(p_control, DIGIT, SHIFT, BINS)
    i_program = tl.program_id(0)
    first, whole, stop = run_of_tiles(i_program, tiles, n, TILE)
    b_above = tl.zeros((TILE,), tl.int32)
    b_ties = tl.zeros((TILE,), tl.int32)
    for i_tile in range(first, whole):
        b_offset = tile_offsets(i_tile, TILE)
        b_class = _classify(load_tile(p_source, b_offset, n, True), b_offset, n, threshold, True)
        b_above += b_class & 0xFFFF
        b_ties += b_class >> 16
    if whole < stop:
        b_offset = tile_offsets(whole, TILE)
        b_class = _classify(load_tile(p_source, b_offset, n, False), b_offset, n, threshold, False)
        b_above += b_class & 0xFFFF
        b_ties += b_class >> 16
    tl.store(p_counts + 2 * i_program, tl.sum(b_above, 0).to(tl.int64))
    tl.store(p_counts + 2 * i_program + 1, tl.sum(b_ties, 0).to(tl.int64))


@triton.jit(do_not_specialize=["n", "tiles"])
def emit_kernel(
    p_err,
    p_control,
    p_counts,
    p_values,
    p_indices,
    p_nonfinite,
    n,
    tiles,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Writes the winners in order of index, and what they leave behind to err."""
    threshold = tl.load(p_control + DECISION).to(tl.int32)
    quota = tl.load(p_control + DECISION + 1)
    i_program = tl.program_id(0)
    b_program = tl.arange(0, PROGRAMS)
    b_before = b_program < i_program
    above = tl.sum(tl.load(p_counts + 2 * b_program, mask=b_before, other=0), 0)
    ties = tl.minimum(tl.sum(tl.load(p_counts + 2 * b_program + 1, mask=b_before, other=0), 0), quota)
    position = above + ties
    quota -= ties
    first, whole, stop = run_of_tiles(i_program, tiles, n, TILE)
    for i_tile in range(first, whole):
        position, quota = _emit_tile(
            p_err, p_values, p_indices, p_nonfinite, i_tile, n, threshold, position, quota, TILE, True
        )
    if whole < stop:
        _emit_tile(p_err, p_values, p_indices, p_nonfinite, whole, n, threshold, position, quota, TILE, False)


@triton.jit(do_not_specialize=["n", "k"])
def scatter_kernel(p_out, p_values, p_indices, n, k, alpha, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices are unique, so that no two programs meet at an element."""
    b_entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_index = tl.load(p_indices + b_entry, mask=b_entry < k, other=-1).to(tl.int64)
    b_valid = (b_index >= 0) & (b_index < n)  # a payload from elsewhere must not write out of bounds
    b_value = widen(tl.load(p_values + b_entry, mask=b_entry < k, other=0.0)) * alpha
    if ACCUMULATE:
        b_value = tl.load(p_out + b_index, mask=b_valid, other=0.0) + b_value
    tl.store(p_out + b_index, b_value, mask=b_valid)


def compress_(compressor: Any, grad: Tensor, err: Tensor, bodies: Tensor, nonfinite: Tensor | None) -> None:
    n = grad.numel()
    values, indices = compressor.layout(n).views(bodies[0])
    programs, tiles = spans(grad, triton.cdiv(n, TILE))
    control = torch.zeros(HISTOGRAMS.value + len(DIGITS) * BINS, dtype=torch.int64, device=grad.device)
    counts = torch.empty(2 * programs, dtype=torch.int64, device=grad.device)
    if nonfinite is None:
        nonfinite = control[DECISION.value + 2 :]  # counted, and forgotten
    grid, shape = (programs,), {"TILE": TILE, "BINS": BINS, "num_warps": 8, **EXACT}
    with launching_on(grad):
        stream_kernel[grid](grad, err, control, n, values.numel(), tiles, **shape)
        for digit in range(1, len(DIGITS)):
            (last, _), (shift, bits) = DIGITS[digit - 1 : digit + 1]
            refine_kernel[grid](
                err, control, n, tiles, DIGIT=digit, LAST_SHIFT=last, SHIFT=shift, BITS=bits, **shape
            )
        last, _ = DIGITS[-1]
        count_kernel[grid](err, control, counts, n, tiles, DIGIT=len(DIGITS) - 1, SHIFT=last, **shape)
        emit_kernel[grid](
            *(err, control, counts, values, indices, nonfinite, n, tiles * (TILE // EMIT_TILE)),
            TILE=EMIT_TILE,
            PROGRAMS=MAX_PROGRAMS,
            num_warps=8,
            **EXACT,
        )


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    values, indices = fields
    k = values.numel()
    if not accumulate:
        out.zero_()
    if k == 0:
        return
    with launching_on(out):
        scatter_kernel[(triton.cdiv(k, BLOCK),)](
            out, values, indices, out.numel(), k, alpha, ACCUMULATE=accumulate, BLOCK=BLOCK, **EXACT
        )
