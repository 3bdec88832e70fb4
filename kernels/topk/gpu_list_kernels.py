"""The kernels of one tensor (see `gpu`), for many: each program first looks up what it works on.

See `gpu_tables` for the tables, and `gpu_lists` for the launches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY
from gck.kernels.topk import gpu_tables
from gck.kernels.topk.gpu_control import (
    EXPECTED,
    GUESS,
    KNOWN,
    LIST,
    LISTED,
    QUOTA,
    THRESHOLD,
    WORDS,
    counted,
    decide,
    last_decision,
    mode_by,
    note,
)
from gck.kernels.topk.gpu_emit import emit_listed, emit_scanned
from gck.kernels.topk.gpu_guess import guess_by_sample, place_of_line, sample_block
from gck.kernels.topk.gpu_select import count_run, refine_part
from gck.kernels.topk.gpu_stream import TILE_WORDS, key_as_number, restore_run, stream_tile

SCANNED = tl.constexpr(128)  # elements at a time of what is emitted from err: more would take registers
CONTROL = tl.constexpr(WORDS)  # words of a selection's control block


@triton.jit
def _at(address, element: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer to elements of this type; 16 bytes at a time where it is ALIGNED."""
    p = address.to(tl.pointer_type(element))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _err_of(p_tensor, ALIGNED: tl.constexpr):
    return _at(tl.load(p_tensor + gpu_tables.ERR), tl.float32, ALIGNED)


@triton.jit
def _choice_of(p_tensor, p_choices, p_control):
    """The row of a tensor's selection, and its control block."""
    choice = tl.load(p_tensor + gpu_tables.SELECTION)
    return p_choices + choice * gpu_tables.CHOICE, p_control + choice * CONTROL


@triton.jit
def _tensor_of(p_tensors, p_choices, p_control, p_owners, i_program):
    """The row of a program's tensor; of its selection, and that one's control block."""
    p_tensor = p_tensors + tl.load(p_owners + i_program) * gpu_tables.TENSOR
    p_choice, p_control = _choice_of(p_tensor, p_choices, p_control)
    return p_tensor, p_choice, p_control


@triton.jit
def _mode_of(p_choice, p_control):
    k = tl.load(p_choice + gpu_tables.K)
    listed, ties, _close = counted(p_control, False)
    return k, mode_by(listed, ties, k, tl.load(p_choice + gpu_tables.CAPACITY))


@triton.jit
def _run_of(p_tensor, i_run, TILE: tl.constexpr):
    """(first tile, end of its tiles, tiles of each run, elements) of a run of a tensor."""
    run_tiles = tl.load(p_tensor + gpu_tables.RUN_TILES).to(tl.int32)
    n = tl.load(p_tensor + gpu_tables.NUMEL)
    first = (i_run - tl.load(p_tensor + gpu_tables.FIRST_RUN)).to(tl.int32) * run_tiles
    return first, tl.minimum(first + run_tiles, tl.cdiv(n, TILE).to(tl.int32)), run_tiles, n


@triton.jit
def list_sample_kernel(
    p_like,
    p_tensors,
    p_choices,
    p_tile_owners,
    p_block_owners,
    p_keys,
    p_bins,
    decay,
    p_clip,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Lines are drawn from the tiles of a selection's tensors; those of another DTYPE are not ours."""
    i_block = tl.program_id(0)
    choice = tl.load(p_block_owners + i_block)
    p_choice = p_choices + choice * gpu_tables.CHOICE
    b_line = (i_block - tl.load(p_choice + gpu_tables.FIRST_BLOCK)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    b_drawn = b_line < tl.load(p_choice + gpu_tables.LINES)
    b_at = place_of_line(b_line, tl.load(p_choice + gpu_tables.STRIDE)) * LINE
    b_tile = tl.load(p_choice + gpu_tables.S_FIRST_TILE) + b_at // TILE
    b_owner = tl.load(p_tile_owners + b_tile, mask=b_drawn, other=0)
    p_tensor = p_tensors + b_owner * gpu_tables.TENSOR
    b_offset = (b_tile - tl.load(p_tensor + gpu_tables.FIRST_TILE)) * TILE + b_at % TILE
    b_left = tl.load(p_tensor + gpu_tables.NUMEL) - b_offset
    b_length = tl.where(b_drawn, tl.minimum(tl.maximum(b_left, 0), LINE), 0)
    b_ours = (b_drawn == 0) | (tl.load(p_tensor + gpu_tables.DTYPE) == DTYPE)
    sample_block(
        tl.load(p_tensor + gpu_tables.GRAD).to(tl.pointer_type(p_like.dtype.element_ty)) + b_offset,
        tl.load(p_tensor + gpu_tables.ERR).to(tl.pointer_type(tl.float32)) + b_offset,
        tl.where(b_ours, b_length, -1),
        p_keys + i_block.to(tl.int64) * BLOCK * LINE,
        p_bins + choice * BINS,
        BLOCK,
        LINE,
        SHIFT,
        decay,
        p_clip,
        RESIDUAL,
    )


@triton.jit
def list_guess_kernel(
    p_choices,
    p_control,
    p_keys,
    p_bins,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    choice = tl.program_id(0).to(tl.int64)
    p_choice = p_choices + choice * gpu_tables.CHOICE
    lines = tl.load(p_choice + gpu_tables.BLOCKS).to(tl.int32) * BLOCK_LINES
    if lines > 0:
        guess_by_sample(
            p_control + choice * CONTROL,
            p_keys + tl.load(p_choice + gpu_tables.FIRST_BLOCK) * BLOCK_LINES * LINE,
            p_bins + choice * BINS,
            lines,
            tl.load(p_choice + gpu_tables.TOTAL),
            tl.load(p_choice + gpu_tables.DENSITY).to(tl.int32).to(tl.float32, bitcast=True),
            tl.load(p_choice + gpu_tables.CAPACITY),
            BINS,
            SHIFT,
            BLOCK,
            LINE,
        )
    else:  # what is not finite reaches any guess, but finds no room
        tl.store(p_control + choice * CONTROL + GUESS, INFINITY)


@triton.jit
def list_stream_kernel(
    p_like,
    p_tensors,
    p_choices,
    p_control,
    p_owners,
    p_list,
    p_locals,
    p_tile,
    decay,
    p_clip,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """A WHOLE tile a program, else what is left of a tensor: the one takes fewer registers by itself."""
    i_program = tl.program_id(0)
    if WHOLE:
        p_tensor = p_tensors + tl.load(p_owners + i_program) * gpu_tables.TENSOR
        first = tl.load(p_tensor + gpu_tables.FIRST_TILE)
        i_tile = (i_program - first).to(tl.int32)
        left = TILE
        ours = i_tile < tl.load(p_tensor + gpu_tables.NUMEL) // TILE
    else:
        p_tensor = p_tensors + i_program * gpu_tables.TENSOR
        first = tl.load(p_tensor + gpu_tables.FIRST_TILE)
        i_tile = (tl.load(p_tensor + gpu_tables.NUMEL) // TILE).to(tl.int32)
        left = (tl.load(p_tensor + gpu_tables.NUMEL) % TILE).to(tl.int32)
        ours = left > 0
    p_choice, p_control = _choice_of(p_tensor, p_choices, p_control)
    if ours & (tl.load(p_tensor + gpu_tables.DTYPE) == DTYPE):
        stream_tile(
            _at(tl.load(p_tensor + gpu_tables.GRAD), p_like.dtype.element_ty, ALIGNED),
            _err_of(p_tensor, ALIGNED),
            p_list,
            p_locals,
            p_list,
            p_tile + first * TILE_WORDS,
            p_control,
            i_tile,
            left,
            WHOLE,
            tl.load(p_choice + gpu_tables.LIST_AT),
            tl.load(p_choice + gpu_tables.CAPACITY),
            TILE,
            True,
            decay,
            p_clip,
            RESIDUAL,
        )


@triton.jit
def list_restore_kernel(
    p_tensors,
    p_choices,
    p_control,
    p_owners,
    p_list,
    p_locals,
    p_tile,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_run = tl.program_id(0)
    p_tensor, p_choice, p_control = _tensor_of(p_tensors, p_choices, p_control, p_owners, i_run)
    _k, mode = _mode_of(p_choice, p_control)
    if mode != LIST:
        first, stop, _run_tiles, _n = _run_of(p_tensor, i_run, TILE)
        list_at = tl.load(p_choice + gpu_tables.LIST_AT)
        p_tile += tl.load(p_tensor + gpu_tables.FIRST_TILE) * TILE_WORDS
        restore_run(
            *(_err_of(p_tensor, ALIGNED), p_list + list_at, p_locals + list_at, p_tile),
            *(first, stop - first, TILE, ROWS, BLOCK, False),
        )


@triton.jit
def list_refine_kernel(
    p_tensors,
    p_choices,
    p_control,
    p_owners,
    p_list,
    DIGIT: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """The programs of a selection share its list; else, those of each tensor its residual."""
    i_program = tl.program_id(0)
    p_tensor, p_choice, p_control = _tensor_of(p_tensors, p_choices, p_control, p_owners, i_program)
    k, mode = _mode_of(p_choice, p_control)
    if mode != KNOWN:
        i_part = i_program - tl.load(p_choice + gpu_tables.S_FIRST_PART)
        prefix = tl.cast(0, tl.int32)
        if DIGIT > 0:
            prefix, wanted = decide(p_control, k, DIGIT - 1, LAST_SHIFT, BINS)
            if i_part == 0:
                note(p_control, prefix, wanted, DIGIT - 1)
        p_source = _err_of(p_tensor, ALIGNED)
        length = tl.load(p_tensor + gpu_tables.NUMEL)
        parts = tl.load(p_tensor + gpu_tables.PARTS)
        if mode == LIST:
            p_source = tl.multiple_of(p_list + tl.load(p_choice + gpu_tables.LIST_AT), 16)
            length = tl.load(p_control + LISTED)
            parts = tl.load(p_choice + gpu_tables.S_PARTS)
        else:
            i_part = i_program - tl.load(p_tensor + gpu_tables.FIRST_PART)
        refine_part(
            *(p_source, p_control, length, i_part, parts, prefix),
            *(DIGIT, SHIFT, BITS, TILE, BINS),
        )


@triton.jit
def list_count_kernel(
    p_tensors,
    p_choices,
    p_control,
    p_owners,
    p_list,
    p_tile,
    p_rows,
    p_groups,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_program = tl.program_id(0)
    p_tensor, p_choice, p_control = _tensor_of(p_tensors, p_choices, p_control, p_owners, i_program)
    k, mode = _mode_of(p_choice, p_control)
    threshold, quota = last_decision(p_control, k, mode, DIGIT, SHIFT, BINS)
    first_run = tl.load(p_choice + gpu_tables.S_FIRST_RUN)
    i_run = (i_program - first_run).to(tl.int32)
    if i_run == 0:
        note(p_control, threshold, quota, DIGIT)
    first, stop, run_tiles, n = _run_of(p_tensor, i_program, TILE)
    count_run(
        p_list + tl.load(p_choice + gpu_tables.LIST_AT),
        _err_of(p_tensor, ALIGNED),
        p_tile + tl.load(p_tensor + gpu_tables.FIRST_TILE) * TILE_WORDS,
        p_rows + first_run * ROWS,
        p_groups + tl.load(p_choice + gpu_tables.S_FIRST_GROUP) * 2,
        *(i_run, first, stop, run_tiles, n, mode == LIST, threshold, TILE, ROWS, BLOCK, GROUP),
    )


@triton.jit
def list_emit_kernel(
    p_tensors,
    p_choices,
    p_control,
    p_owners,
    p_list,
    p_locals,
    p_tile,
    p_rows,
    p_groups,
    p_values,
    p_indices,
    p_nonfinite,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_program = tl.program_id(0)
    p_tensor, p_choice, p_control = _tensor_of(p_tensors, p_choices, p_control, p_owners, i_program)
    _k, mode = _mode_of(p_choice, p_control)
    threshold = tl.load(p_control + THRESHOLD).to(tl.int32)
    quota = tl.load(p_control + QUOTA)
    first_run = tl.load(p_choice + gpu_tables.S_FIRST_RUN)
    i_run = (i_program - first_run).to(tl.int32)
    first, stop, run_tiles, n = _run_of(p_tensor, i_program, TILE)
    list_at = tl.load(p_choice + gpu_tables.LIST_AT)
    values = p_values.to(tl.int64) + tl.load(p_choice + gpu_tables.VALUES)
    indices = p_indices.to(tl.int64) + tl.load(p_choice + gpu_tables.INDICES)
    p_err = _err_of(p_tensor, ALIGNED)
    p_rows += first_run * ROWS
    p_groups += tl.load(p_choice + gpu_tables.S_FIRST_GROUP) * 2
    p_values = _at(values, p_values.dtype.element_ty, False)
    p_indices = _at(indices, p_indices.dtype.element_ty, False)
    origin = tl.load(p_tensor + gpu_tables.ORIGIN)
    if mode == LIST:
        p_tile += tl.load(p_tensor + gpu_tables.FIRST_TILE) * TILE_WORDS
        emit_listed(
            *(p_list + list_at, p_locals + list_at, p_err, p_tile, p_rows, p_groups, p_values, p_indices),
            *(p_nonfinite, i_run, first, stop, origin, threshold, quota, key_as_number(p_control + EXPECTED)),
            *(TILE, TILE, ROWS, BLOCK, GROUP, False),
        )
    else:
        emit_scanned(
            *(p_err, p_rows, p_groups, p_values, p_indices, p_nonfinite, i_run, first, run_tiles, n),
            *(origin, threshold, quota, TILE, ROWS, GROUP, SCANNED),
        )
