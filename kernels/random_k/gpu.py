"""Random-k with error feedback on the GPU: one pass, a tile of the vector a program.

A program adds its tile to err and then takes the entries chosen in it, which it finds by their numbers
alone. What is not finite and not chosen must spoil the entry of its stratum, which may lie in another
program's tile: the entry is marked, and a second, small kernel looks through the marks. Its residual is what
rounding has left of it, nothing in fp32; of 16-bit values statistics add up residuals after that kernel, in
one more read of err.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.gpu_statistics import finish, partial_sums
from gck.kernels.common.keys import (
    INFINITY,
    QUIET_NAN,
    accumulate,
    canonical,
    count_cleared,
    is_finite,
    magnitude_key,
    round_to,
    widen,
)
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.residual import read_residual, residual_arguments
from gck.kernels.common.statistics import sum_read, sum_stored
from gck.kernels.common.tiles import load_tile, tile_offsets
from gck.kernels.random_k.gpu_ring import (
    RING,
    Ring,
    entries_of,
    entry_of,
    rank_of,
    strata_of,
    stratum_of,
    widened,
)
from gck.wire import Layout

TILE = 4096
WARPS = 8
SLOTS = 256  # entries that a program works on together: one a thread
PART = tl.constexpr(512)  # elements that are searched together for what is not finite
SPOIL_BLOCK = 1024


@triton.jit
def _mark_nonfinite(p_err, p_spoilt, p_nonfinite, base, ring, TILE: tl.constexpr):
    """Clears what is not finite in a tile, and marks its strata."""
    for start in range(0, TILE, PART):
        b_element = base + start + tl.arange(0, PART)
        b_acc = tl.load(p_err + b_element, mask=b_element < ring[0], other=0.0)
        b_bad = (b_element < ring[0]) & (is_finite(b_acc) == 0)
        tl.store(p_spoilt + rank_of(stratum_of(b_element, ring), ring), 1, mask=b_bad)
        tl.store(p_err + b_element, 0.0, mask=b_bad)
        count_cleared(p_nonfinite, b_bad)


@triton.jit
def _compress_tile(
    p_grad,
    p_err,
    p_values,
    p_spoilt,
    p_nonfinite,
    ring,
    factor,
    decay,
    p_clip,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * TILE
    b_offset = tile_offsets(tl.program_id(0), TILE)
    b_grad = load_tile(p_grad, b_offset, ring[0], WHOLE)
    b_err = read_residual(load_tile(p_err, b_offset, ring[0], WHOLE), decay, p_clip, RESIDUAL)
    b_acc = accumulate(b_grad, b_err)
    if WHOLE:
        tl.store(p_err + b_offset, b_acc)
    else:
        tl.store(p_err + b_offset, b_acc, mask=b_offset < ring[0])
    top = tl.max(magnitude_key(b_acc), 0)
    lowest, strata = strata_of(base, ring, TILE)
    tl.debug_barrier()  # what other threads have added is read
    for start in range(0, strata, SLOTS):
        b_element, b_rank, b_here = entries_of(base, lowest, strata, start, ring, TILE, SLOTS)
        b_there = tl.load(p_err + b_element, mask=b_here, other=0.0)
        b_sent = round_to(canonical(b_there * factor), p_values.dtype.element_ty)
        b_rest = b_there - widen(b_sent)
        b_lost = b_here & (is_finite(b_rest) == 0)
        tl.debug_barrier()  # threads that do the same work have read it, too
        tl.store(p_values + b_rank, b_sent, mask=b_here)
        tl.store(p_err + b_element, tl.where(b_lost, 0.0, b_rest), mask=b_here)
        count_cleared(p_nonfinite, b_lost)
    if top >= INFINITY:
        tl.debug_barrier()  # entries that were sent have left
        _mark_nonfinite(p_err, p_spoilt, p_nonfinite, base, ring, TILE)


@triton.jit(do_not_specialize=RING)
def compress_kernel(
    p_grad,
    p_err,
    p_values,
    p_spoilt,
    p_nonfinite,
    p_sums,
    numel,
    k,
    size,
    longer,
    rotation,
    first,
    key_0,
    key_1,
    factor,
    decay,
    p_clip,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STATS: tl.constexpr,
):
    """p_spoilt: (k,) uint8, zeros; 1 where an entry's stratum holds something not finite."""
    ring = widened((numel, k, size, longer, rotation, first, key_0, key_1))
    base = tl.program_id(0).to(tl.int64) * TILE
    if STATS:
        sum_read(p_grad, p_err, p_sums, ring[0], base, ring[0], decay, p_clip, TILE, RESIDUAL)
    given = (p_grad, p_err, p_values, p_spoilt, p_nonfinite, ring, factor, decay, p_clip)
    if base + TILE <= ring[0]:
        _compress_tile(*given, TILE, SLOTS, RESIDUAL, True)
    else:
        _compress_tile(*given, TILE, SLOTS, RESIDUAL, False)
    if STATS and p_values.dtype.element_ty == tl.float32:
        left = tl.minimum(ring[0] - base, TILE).to(tl.int32)
        sum_stored(p_err + base, p_sums, ring[0], base, left, False)


@triton.jit(do_not_specialize=RING)
def spoil_kernel(
    p_err,
    p_values,
    p_spoilt,
    p_nonfinite,
    numel,
    k,
    size,
    longer,
    rotation,
    first,
    key_0,
    key_1,
    BLOCK: tl.constexpr,
):
    """Sends NaN for what is finite in strata that are not."""
    ring = widened((numel, k, size, longer, rotation, first, key_0, key_1))
    b_rank = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_spoilt = tl.load(p_spoilt + b_rank, mask=b_rank < ring[1], other=0) != 0
    if tl.max(b_spoilt.to(tl.int32), 0) > 0:
        b_sent = widen(tl.load(p_values + b_rank, mask=b_spoilt, other=0.0))
        b_spoilt &= is_finite(b_sent)
        b_stratum = b_rank + ring[5]
        b_stratum = tl.where(b_stratum >= ring[1], b_stratum - ring[1], b_stratum)
        b_nan = tl.full((BLOCK,), QUIET_NAN, tl.int32).to(tl.float32, bitcast=True)
        tl.store(p_values + b_rank, round_to(b_nan, p_values.dtype.element_ty), mask=b_spoilt)
        tl.store(p_err + entry_of(b_stratum, ring), 0.0, mask=b_spoilt)
        count_cleared(p_nonfinite, b_spoilt)


@triton.jit(do_not_specialize=["numel"])
def left_kernel(p_err, p_sums, numel, TILE: tl.constexpr):
    """The partial sums of what stays."""
    n = tl.cast(numel, tl.int64)
    base = tl.program_id(0).to(tl.int64) * TILE
    sum_stored(p_err + base, p_sums, n, base, tl.minimum(n - base, TILE).to(tl.int32), False)


@triton.jit(do_not_specialize=[*RING, "ranks", "row_units"])
def decompress_kernel(
    p_out,
    p_values,
    numel,
    k,
    size,
    longer,
    rotation,
    first,
    key_0,
    key_1,
    ranks,
    row_units,
    alpha,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    CLEAR: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program owns a tile and adds the values of all ranks, row_units * 16 bytes apart, in order.
    CLEAR: out is set to zeros first; ADD: decoded values are added, else written."""
    ring = widened((numel, k, size, longer, rotation, first, key_0, key_1))
    base = tl.program_id(0).to(tl.int64) * TILE
    if CLEAR:
        b_offset = tile_offsets(tl.program_id(0), TILE)
        b_zero = tl.zeros((TILE,), tl.float32)
        if base + TILE <= ring[0]:
            tl.store(p_out + b_offset, b_zero)
        else:
            tl.store(p_out + b_offset, b_zero, mask=b_offset < ring[0])
    row = tl.cast(row_units, tl.int64) * (128 // p_values.dtype.element_ty.primitive_bitwidth)
    lowest, strata = strata_of(base, ring, TILE)
    for start in range(0, strata, SLOTS):
        b_element, b_rank, b_here = entries_of(base, lowest, strata, start, ring, TILE, SLOTS)
        if ADD:
            if CLEAR:
                b_sum = tl.zeros((SLOTS,), tl.float32)
            else:
                b_sum = tl.load(p_out + b_element, mask=b_here, other=0.0)
            for rank in range(ranks):
                b_value = tl.load(p_values + tl.cast(rank, tl.int64) * row + b_rank, mask=b_here, other=0.0)
                b_sum += widen(b_value) * alpha
        else:
            b_sum = widen(tl.load(p_values + b_rank, mask=b_here, other=0.0)) * alpha
        tl.debug_barrier()  # zeros are there; and threads that do the same work have read what was
        tl.store(p_out + b_element, b_sum, mask=b_here)


def compress_(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
    stats: Tensor | None = None,
) -> None:
    n = grad.numel()
    layout = compressor.layout(n)
    (values,) = layout.views(bodies if bodies.dim() == 1 else bodies[0])
    ring = Ring.of(compressor.seed, n, values.numel())
    spoilt = torch.zeros(ring.k, dtype=torch.uint8, device=grad.device)
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=grad.device)
    decay, p_clip, residual = residual_arguments(compressor.decay, err, clip)
    sums = partial_sums(err, stats)
    with launching_on(grad):
        compress_kernel[(triton.cdiv(n, TILE),)](
            grad,
            err,
            values,
            spoilt,
            nonfinite,
            sums,
            *ring,
            compressor.factor(n),
            decay,
            p_clip,
            TILE=TILE,
            SLOTS=SLOTS,
            RESIDUAL=residual,
            STATS=stats is not None,
            num_warps=WARPS,
            **EXACT,
        )
        spoil_kernel[(triton.cdiv(ring.k, SPOIL_BLOCK),)](
            err, values, spoilt, nonfinite, *ring, BLOCK=SPOIL_BLOCK, num_warps=4, **EXACT
        )
        if stats is not None and values.dtype != torch.float32:
            left_kernel[(triton.cdiv(n, TILE),)](err, sums, n, TILE=TILE, num_warps=WARPS, **EXACT)
    if stats is not None:
        finish(sums, stats, ring.k)


def decompress_(
    compressor: Any, out: Tensor, fields: tuple[Tensor, ...], alpha: float, accumulate: bool
) -> None:
    _decompress(compressor, out, fields[0], 1, 0, alpha, clear=not accumulate, add=accumulate)


def decompress_sum_(
    compressor: Any, out: Tensor, bodies: Tensor, layout: Layout, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * each of `bodies`, (W, nbytes) uint8 with this layout, in row order."""
    (values,) = layout.views(bodies[0])
    ranks, row_units = bodies.shape[0], bodies.stride(0) // 16
    _decompress(compressor, out, values, ranks, row_units, alpha, clear=not accumulate, add=True)


def _decompress(
    compressor: Any,
    out: Tensor,
    values: Tensor,
    ranks: int,
    row_units: int,
    alpha: float,
    *,
    clear: bool,
    add: bool,
) -> None:
    ring = Ring.of(compressor.seed, out.numel(), values.numel())
    with launching_on(out):
        decompress_kernel[(triton.cdiv(out.numel(), TILE),)](
            out,
            values,
            *ring,
            ranks,
            row_units,
            alpha,
            TILE=TILE,
            SLOTS=SLOTS,
            CLEAR=clear,
            ADD=add,
            num_warps=WARPS,
            **EXACT,
        )
