"""Entries of all ranks to the entries of their sum: one pass.

A program has a scratch chunk of its own, which it uses for one chunk after another, so that it stays in a
cache: the ranks are added up there in their order, as fp32 additions must be. What is there is divided, added
to the residual and compressed as an accumulated gradient is.

Memory moves the payloads, and the residual both ways. Caches move more for an element, of 64 of 4096 of eight
ranks: 4 bytes of zeros, 4 each way of the entries' sectors, and 4 of the sum, which is read once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl

from gck.kernels.chunk_topk.gpu import WARP_PART, compress_group, compress_options
from gck.kernels.chunk_topk.gpu_sum import CLEAR, row_fields, sum_chunks, sum_options
from gck.kernels.common.division import division
from gck.kernels.common.launch import EXACT, launching_on, looping, registers
from gck.kernels.common.reduction import Reduction
from gck.kernels.common.residual import ABSENT, reduction_arguments

# Of a processor: elements that its programs have under way, whose sums and residuals take all of an H100's
# nearest cache, and together two thirds of the farther one; and warps.
UNDER_WAY = 32768
MOST_WARPS = 16
REGISTERS = 65536  # of a processor
MOST_REGISTERS = 255  # of a thread


@triton.jit(do_not_specialize=["n", "ranks", "row_units"])
def reduce_kernel(
    p_err,
    p_scratch,
    p_position,
    p_from_values,
    p_from_scales,
    p_from_indices,
    p_values,
    p_scales,
    p_indices,
    p_nonfinite,
    n,
    ranks,
    row_units,
    number,
    decay,
    p_clip,
    FROM_K: tl.constexpr,
    FROM_BITS: tl.constexpr,
    FROM_INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SLOT_LEVELS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    DIVISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """A program reduces groups of CHUNKS chunks, as many programs apart as there are. Scratch and positions
    have room for a group of each. Bodies of the ranks are row_units * 16 bytes apart. Without a residual,
    p_err is of no account."""
    SIZE: tl.constexpr = CHUNKS * 2**LEVELS
    i_program = tl.program_id(0).to(tl.int64)
    p_scratch += i_program * SIZE
    p_position += i_program * (CHUNKS * max(K, CAPACITY))
    groups = (tl.cast(n, tl.int64) + SIZE - 1) // SIZE
    # A group that is cut short takes many times as long: where there is one, the first program does no other.
    short = ((tl.cast(n, tl.int64) % SIZE != 0) & (tl.num_programs(0) > 1)).to(tl.int32)
    first, stop = i_program - short, groups - short
    if (short > 0) & (i_program == 0):
        first, stop = groups - 1, groups
    for i_group in tl.range(first, stop, tl.num_programs(0) - short, disable_licm=True):
        i_chunk = i_group * CHUNKS
        left = tl.minimum(n - i_group * SIZE, SIZE).to(tl.int32)
        tl.debug_barrier()  # what the turn before left in the scratch has been read
        sum_chunks(
            *(p_scratch, p_from_values, p_from_scales, p_from_indices, i_chunk, left, ranks, row_units, 1.0),
            *(FROM_K, CHUNKS, LEVELS, FROM_BITS, FROM_INDEX_BITS, SLOTS, RANKS, CLEAR, True),
        )
        tl.debug_barrier()
        p_held = p_scratch
        if RESIDUAL != ABSENT:
            p_held = p_err + i_group * SIZE
        compress_group(
            *(p_scratch, p_held, p_position, p_values, p_scales, p_indices, p_nonfinite, p_err),
            *(0, i_chunk, 0, n, i_group * SIZE, left, number, decay, p_clip),
            *(K, CHUNKS, LEVELS, GROUPS, CAPACITY, BITS, INDEX_BITS, SLOT_LEVELS, PART, STEP),
            *(DIVISION, RESIDUAL, False),
        )


def reduce_options(
    compressor: Any, server: Any, ranks: int, kind: str, residual: int
) -> tuple[dict[str, Any], int, int | None, int]:
    """(compile-time values, warps, most registers, programs a processor) of `reduce_kernel`."""
    options, num_warps = compress_options(server)
    del options["STATS"]
    options |= {
        "FROM_K": compressor.k,
        "FROM_BITS": compressor.value_bits,
        "FROM_INDEX_BITS": 12 if compressor.packs_indices else 16,
        **sum_options(compressor.k, options["CHUNKS"], ranks, num_warps),
        "DIVISION": kind,
        "RESIDUAL": residual,
    }
    programs = min(UNDER_WAY // (options["CHUNKS"] * compressor.chunk_size), MOST_WARPS // num_warps)
    programs = max(programs, 1)
    most = REGISTERS // (programs * num_warps * 32)
    if most < MOST_REGISTERS:
        options["PART"] = min(options["PART"], 2 * WARP_PART * num_warps)
    if kind == "quotient":
        # Each division takes registers of its own, so that fewer elements are under way.
        options["PART"] = min(options["PART"], WARP_PART * num_warps)
    return options, num_warps, most if most < MOST_REGISTERS else None, programs


def reduce_(compressor: Any, job: Reduction) -> None:
    """See `gck.kernels.common.reduction.Reduction`."""
    device, ranks = job.body.device, job.bodies.shape[0]
    number, kind = division(job.divisor)
    decay, clip, residual = reduction_arguments(job)
    options, num_warps, most, each = reduce_options(compressor, job.server, ranks, kind, residual)
    size = options["CHUNKS"] * compressor.chunk_size
    programs = min(triton.cdiv(job.numel, size), looping(job.body, each))
    positions = programs * options["CHUNKS"] * max(options["K"], options["CAPACITY"])
    scratch = torch.empty(programs * size, dtype=torch.float32, device=device)
    nonfinite = job.nonfinite
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
    with launching_on(job.body):
        reduce_kernel[(programs,)](
            scratch if job.err is None else job.err,
            scratch,
            torch.empty(positions, dtype=torch.int16, device=device),
            *row_fields(compressor, job.layout.views(job.bodies[0])),
            *row_fields(job.server, job.server.layout(job.numel).views(job.body)),
            *(nonfinite, job.numel, ranks, job.bodies.stride(0) // 16, number, decay, clip),
            **options,
            num_warps=num_warps,
            **registers(most),
            **EXACT,
        )
