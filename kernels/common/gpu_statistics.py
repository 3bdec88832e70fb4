"""Adding up the partial sums of a call's statistics (see `statistics`), a launch or two after its kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from gck.kernels.common.keys import is_finite, widen
from gck.kernels.common.launch import EXACT, launching_on
from gck.kernels.common.residual import residual_arguments
from gck.kernels.common.statistics import BLOCK, LEVELS, store_err_sums, sum_read
from gck.kernels.common.tree import halving_sum

ROWS = 4
WARPS = 4
MEASURED = 2048  # elements a program


@triton.jit(do_not_specialize=["count"])
def tree_kernel(p_sums, p_out, count):
    """Sums of BLOCK numbers each of rows of `count`: as many rows of one number a program."""
    i_block = tl.program_id(0).to(tl.int64)
    i_row = tl.program_id(1).to(tl.int64)
    b_at = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_sums + i_row * count + b_at, mask=b_at < count, other=0.0)
    b_sum = halving_sum(tl.reshape(b_x, (1, BLOCK)), 1, LEVELS)
    tl.store(p_out + i_row * tl.num_programs(0) + i_block + tl.arange(0, 1), b_sum)


@triton.jit(do_not_specialize=["k"])
def sent_kernel(p_values, p_indices, p_err, p_sums, k, ROUNDED: tl.constexpr):
    """acc^2 - err^2 of the entries that were sent, by BLOCKs of them; of one that is not finite as it
    travels, nothing. acc is the sum of what travels and what stays, exactly."""
    i_block = tl.program_id(0).to(tl.int64)
    b_entry = i_block * BLOCK + tl.arange(0, BLOCK)
    b_inside = b_entry < k
    b_value = widen(tl.load(p_values + b_entry, mask=b_inside, other=0.0))
    b_finite = is_finite(b_value)
    b_acc = tl.where(b_finite, b_value, 0.0).to(tl.float64)
    b_both = b_acc * b_acc
    if ROUNDED:
        b_index = tl.load(p_indices + b_entry, mask=b_inside, other=0)
        b_left = tl.load(p_err + b_index, mask=b_inside & b_finite, other=0.0).to(tl.float64)
        b_acc += b_left
        b_both = b_acc * b_acc - b_left * b_left
    b_sum = halving_sum(tl.reshape(b_both, (1, BLOCK)), 1, LEVELS)
    tl.store(p_sums + i_block + tl.arange(0, 1), b_sum)


@triton.jit(do_not_specialize=["n"])
def measure_kernel(
    p_grad, p_err, p_sums, n, decay, p_clip, SIZE: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr
):
    """Partial sums of acc, or else of the residual alone, of SIZE elements a program."""
    base = tl.program_id(0).to(tl.int64) * SIZE
    if ACC:
        sum_read(p_grad, p_err, p_sums, n, base, tl.cast(n, tl.int64), decay, p_clip, SIZE, RESIDUAL)
    else:
        b_at = base + tl.arange(0, SIZE)
        store_err_sums(p_sums, n, base, tl.load(p_err + b_at, mask=b_at < n, other=0.0))


def measure_acc(grad: Tensor, err: Tensor, decay: float, clip: Tensor | None) -> Tensor:
    """Partial sums of acc = grad + err as it is read; `measure_err` takes them."""
    sums = torch.empty((ROWS, triton.cdiv(err.numel(), BLOCK.value)), dtype=torch.float64, device=err.device)
    _measure(grad, err, sums, residual_arguments(decay, err, clip), acc=True)
    return sums


def measure_err(sums: Tensor, err: Tensor, selected: int) -> Tensor:
    """(5,) statistics of what `measure_acc` saw, and of the residual that was left of it."""
    _measure(err, err, sums, residual_arguments(1.0, err, None), acc=False)
    values = torch.empty(ROWS + 1, dtype=torch.float64, device=err.device)
    finish(sums, values, selected)
    return values


def _measure(
    grad: Tensor, err: Tensor, sums: Tensor, residual: tuple[float, Tensor, int], *, acc: bool
) -> None:
    decay, clip, kind = residual
    options = {"SIZE": MEASURED, "ACC": acc, "RESIDUAL": kind, "num_warps": WARPS, **EXACT}
    with launching_on(err):
        measure_kernel[(triton.cdiv(err.numel(), MEASURED),)](
            grad, err, sums, err.numel(), decay, clip, **options
        )


def partial_sums(err: Tensor, stats: Tensor | None) -> Tensor:
    """Room for the partial sums of a vector; without statistics, any address."""
    if stats is None:
        return err
    blocks = triton.cdiv(err.numel(), BLOCK.value)
    return torch.empty((ROWS, blocks), dtype=torch.float64, device=err.device)


def finish(sums: Tensor, stats: Tensor, selected: int) -> None:
    """Adds up partial sums: (5,) statistics of a payload of `selected` entries."""
    _add_up(sums, stats)
    stats[ROWS:].fill_(selected)


def finish_sent(sums: Tensor, stats: Tensor, values: Tensor, indices: Tensor, err: Tensor) -> None:
    """`finish` for a payload of single entries: err^2 is acc^2 less what was sent of it."""
    k = values.numel()
    sent = torch.empty((1, triton.cdiv(k, BLOCK.value)), dtype=torch.float64, device=err.device)
    rounded = values.dtype != torch.float32
    with launching_on(err):
        sent_kernel[(sent.shape[1],)](
            values, indices, err, sent, k, ROUNDED=rounded, num_warps=WARPS, **EXACT
        )
    finish(sums, stats, k)
    whole = torch.empty_like(sent[0, :1])
    _add_up(sent, whole)
    torch.sub(stats[1:2], whole, out=stats[2:3]).clamp_(min=0.0)


def _add_up(sums: Tensor, out: Tensor) -> None:
    rows, count = sums.shape
    while True:
        blocks = triton.cdiv(count, BLOCK.value)
        target = out if blocks == 1 else torch.empty((rows, blocks), dtype=out.dtype, device=out.device)
        with launching_on(sums):
            tree_kernel[(blocks, rows)](sums, target, count, num_warps=WARPS, **EXACT)
        if blocks == 1:
            return
        sums, count = target, blocks
