"""Top-k of many tensors in as many launches as of one: from each by itself, or from all of them together.

Gradients may differ in dtype: only `sample` and `stream` read them, in a launch a dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gck.kernels.common.launch import EXACT, launching_on, registers
from gck.kernels.common.native import DTYPE_CODE
from gck.kernels.common.residual import residual_arguments
from gck.kernels.topk.gpu_control import BINS, DIGITS, NONFINITE, WORDS
from gck.kernels.topk.gpu_emit import EMIT_REGISTERS, EMIT_WARPS
from gck.kernels.topk.gpu_guess import (
    BIN_SHIFT,
    BLOCK_LINES,
    GUESS_BLOCK,
    LINE,
    SAMPLE_BINS,
)
from gck.kernels.topk.gpu_list_kernels import (
    list_count_kernel,
    list_emit_kernel,
    list_guess_kernel,
    list_refine_kernel,
    list_restore_kernel,
    list_sample_kernel,
    list_stream_kernel,
)
from gck.kernels.topk.gpu_select import BLOCK, GROUP, REFINE_WARPS, ROWS, RUN_WARPS
from gck.kernels.topk.gpu_stream import STREAM_REGISTERS, STREAM_WARPS, TILE, TILE_WORDS
from gck.kernels.topk.gpu_tables import Choice, plan_for
from gck.kernels.topk.lists import Bodies
from gck.payload import index_dtype

LIST_GUESS_WARPS = 8  # of 64-bit sizes


def compress_list_(
    bodies: Bodies,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    memory: Tensor,
    nonfinite: Tensor | None,
    decay: float = 1.0,
    clip: Tensor | None = None,
) -> None:
    """Compresses each tensor by itself.

    Args:
        bodies: one a tensor.
        grads, errs: contiguous tensors; residuals are updated in place.
        memory: (bodies.nbytes,) uint8, zeroed, at a multiple of 16 bytes.
        nonfinite, clip: see `kernels.common.base`.
    """
    # Vectors so long that their indices have 64 bits are few: they take launches of their own.
    for those, choices, firsts in _alike(bodies):
        views = [memory[start:end].view(dtype) for start, end, dtype in firsts]
        _compress([grads[i] for i in those], [errs[i] for i in those], choices, views, nonfinite, decay, clip)


Group = tuple[list[int], tuple[Choice, ...], list[tuple[int, int, torch.dtype]]]


@lru_cache(maxsize=64)
def _alike(bodies: Bodies) -> list[Group]:
    """Of the tensors, but empty ones, whose indices are of one dtype: which they are, what is selected from
    them, and the bytes and dtype of the first one's values, and of its indices."""
    groups: list[Group] = []
    for dtype in (torch.int32, torch.int64):
        those = [i for i, n in enumerate(bodies.numels) if n and index_dtype(n) == dtype]
        if those:
            places = [(bodies.offset(i, 0), bodies.offset(i, 1)) for i in those]
            values, indices = places[0]
            choices = [
                Choice(bodies.layouts[i].fields[0].count, 1, v - values, j - indices)
                for i, (v, j) in zip(those, places, strict=True)
            ]
            firsts = [
                (start, start + field.end - field.offset, field.dtype)
                for start, field in zip(places[0], bodies.layouts[those[0]].fields, strict=True)
            ]
            groups.append((those, tuple(choices), firsts))
    return groups


def compress_flat_(
    compressor: Any,
    grads: Sequence[Tensor],
    errs: Sequence[Tensor],
    bodies: Tensor,
    nonfinite: Tensor | None,
    clip: Tensor | None = None,
) -> None:
    """Compresses the concatenation of the tensors, whose indices count on from one to the next.

    Args:
        compressor: selects from all elements together.
        grads, errs, nonfinite, clip: see `compress_list_`.
        bodies: (1, layout(numel of all).nbytes) uint8, zeroed.
    """
    those = [i for i, grad in enumerate(grads) if grad.numel()]
    if those:
        views = compressor.layout(sum([grad.numel() for grad in grads])).views(bodies[0])
        choices = (Choice(views[0].numel(), len(those), 0, 0),)
        given = [grads[i] for i in those], [errs[i] for i in those]
        _compress(*given, choices, views, nonfinite, compressor.decay, clip)


def _compress(
    grads: list[Tensor],
    errs: list[Tensor],
    choices: tuple[Choice, ...],
    views: Sequence[Tensor],
    nonfinite: Tensor | None,
    decay: float,
    clip: Tensor | None,
) -> None:
    """`views` are of the values and indices of the first selection."""
    values, indices = views
    plan = plan_for(grads, errs, choices)
    device = grads[0].device
    tiles, runs = len(plan.tensor_of_tile), len(plan.tensor_of_run)
    parts, blocks = len(plan.tensor_of_part), len(plan.choice_of_block)

    def scratch(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    sizes = [len(choices) * WORDS, 2 * plan.groups, len(choices) * SAMPLE_BINS // 2 if blocks else 0]
    control, groups, bins = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    bins = bins.view(torch.int32)
    keys = scratch(blocks * BLOCK_LINES * LINE, torch.int32)
    list_, locals_ = scratch(plan.listed, torch.float32), scratch(plan.listed, torch.int16)
    tile_words, rows = scratch(tiles * TILE_WORDS.value), scratch(runs * ROWS, torch.int32)
    if nonfinite is None:
        nonfinite = control[NONFINITE.value :]
    tables = (plan.tensors, plan.choices, control)
    aligned = {"ALIGNED": plan.aligned, "TILE": TILE, **EXACT}
    run = {**aligned, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": RUN_WARPS}
    line = {"LINE": LINE, "SHIFT": BIN_SHIFT, "BINS": SAMPLE_BINS, **EXACT}
    likes = {grad.dtype: grad for grad in grads}
    beta, p_clip, residual = residual_arguments(decay, errs[0], clip)
    with launching_on(grads[0]):
        for dtype, like in likes.items() if blocks else ():
            list_sample_kernel[(blocks,)](
                *(like, plan.tensors, plan.choices, plan.tensor_of_tile, plan.choice_of_block, keys, bins),
                *(beta, p_clip),
                DTYPE=DTYPE_CODE[dtype],
                RESIDUAL=residual,
                TILE=TILE,
                BLOCK=BLOCK_LINES,
                num_warps=4,
                **line,
            )
        list_guess_kernel[(len(choices),)](
            *(plan.choices, control, keys, bins),
            BLOCK_LINES=BLOCK_LINES,
            BLOCK=GUESS_BLOCK,
            num_warps=LIST_GUESS_WARPS,
            **line,
        )
        for dtype, like in likes.items():
            for count, whole in ((tiles, True), (len(grads), False)):
                list_stream_kernel[(count,)](
                    *(like, *tables, plan.tensor_of_tile, list_, locals_, tile_words, beta, p_clip),
                    DTYPE=DTYPE_CODE[dtype],
                    RESIDUAL=residual,
                    WHOLE=whole,
                    num_warps=STREAM_WARPS,
                    **registers(STREAM_REGISTERS),
                    **aligned,
                )
        if plan.listed:
            list_restore_kernel[(runs,)](*tables, plan.tensor_of_run, list_, locals_, tile_words, **run)
        for digit, (shift, bits) in enumerate(DIGITS):
            list_refine_kernel[(parts,)](
                *(*tables, plan.tensor_of_part, list_),
                DIGIT=digit,
                LAST_SHIFT=DIGITS[max(digit - 1, 0)][0],
                SHIFT=shift,
                BITS=bits,
                BINS=BINS,
                num_warps=REFINE_WARPS,
                **aligned,
            )
        counted = (tile_words, rows, groups)
        list_count_kernel[(runs,)](
            *(*tables, plan.tensor_of_run, list_, *counted),
            DIGIT=len(DIGITS) - 1,
            SHIFT=DIGITS[-1][0],
            BINS=BINS,
            GROUP=GROUP,
            **run,
        )
        list_emit_kernel[(runs,)](
            *(*tables, plan.tensor_of_run, list_, locals_, *counted, values, indices, nonfinite),
            GROUP=GROUP,
            **registers(EMIT_REGISTERS),
            **(run | {"num_warps": EMIT_WARPS}),
        )
