"""Specialisations of the kernels of top-k."""

from __future__ import annotations

from typing import Any

import torch

from gck.kernels.common.launch import TOGETHER_REGISTERS
from gck.kernels.common.native import DTYPE_CODE
from gck.kernels.topk import (
    gpu,
    gpu_bracket,
    gpu_control,
    gpu_decode,
    gpu_emit,
    gpu_guess,
    gpu_lists,
    gpu_refine,
    gpu_select,
    gpu_stream,
)
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants

POINTERS = {
    "p_err": "*fp32",
    "p_list": "*fp32",
    "p_locals": "*i16",
    "p_bracket": "*fp32",
    "p_tile": "*i64",
    "p_rows": "*i32",
    "p_runs": "*i64",
    "p_groups": "*i64",
    "p_control": "*i64",
    "p_keys": "*i32",
    "p_bins": "*i32",
    "p_hint": "*i32",
    "p_nonfinite": "*i64",
    "p_out": "*fp32",
    "p_bounds": "*i64",
    "p_near": "*i32",
    "p_candidates": "*i32",
    "p_tensors": "*i64",
    "p_choices": "*i64",
    "p_owners": "*i64",
    "p_tile_owners": "*i64",
    "p_block_owners": "*i64",
}
NUMBERS = dict.fromkeys(
    (
        "n",
        "k",
        "capacity",
        "bracket_capacity",
        "long",
        "first_tile",
        "tiles",
        "runs",
        "words",
        "step",
        "lines",
        "stride",
        "steps",
        "ranks",
        "row_units",
    ),
    "i32",
)
TYPES = {**POINTERS, **NUMBERS, "alpha": "fp32", "density": "fp32", **RESIDUAL_TYPES}
TILE = {"TILE": gpu_stream.TILE}
RUN = {**TILE, "ROWS": gpu_select.ROWS, "BLOCK": gpu_select.BLOCK}
SAMPLE = {"LINE": gpu_guess.LINE, "SHIFT": gpu_guess.BIN_SHIFT}
PAYLOADS = (("fp32", "i32"), ("bf16", "i32"), ("fp16", "i64"))
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i32": 4, "i64": 8}


def variants() -> list[Variant]:
    return [*_guess(), *_stream(), *_select(), *_decode(), *_lists()]


def _variant(
    module: str,
    kernel: str,
    label: str,
    constants: dict[str, Any],
    num_warps: int,
    elements: int = 0,
    most_registers: int | None = None,
    **types: str,
) -> Variant:
    return Variant(
        "topk", module, kernel, label, TYPES | types, constants, num_warps, elements, most_registers
    )


def _guess() -> list[Variant]:
    made = []
    for grad, options in (("fp32", ""), ("bf16", ""), ("fp32", ", clip")):
        constants = {"LINE": gpu_guess.LINE, "LINES": gpu_bracket.LINES, "HINT": True}
        n = 100_000_000
        _, share, room = gpu_bracket.sample_shape(n, n // 100, gpu_bracket.LINES, gpu_bracket.CANDIDATES)
        constants |= {"SHARE": share, "CANDIDATES": room}
        constants |= {"RESIDUAL": residual_constants(options)["RESIDUAL"]}
        made.append(
            _variant(
                *("gpu_bracket", "guess_kernel", grad + options, constants, gpu_bracket.BRACKET_WARPS),
                most_registers=gpu_bracket.BRACKET_REGISTERS,
                p_grad=f"*{grad}",
            )
        )
    return made


def _stream() -> list[Variant]:
    made = []
    warps = gpu_stream.STREAM_WARPS
    each = gpu_stream.TILE // (32 * warps)
    for grad in ("fp32", "bf16", "fp16"):
        for label, listing, fours in (
            ("fours", True, True),
            ("last", True, False),
            ("no list", False, False),
        ):
            constants = {**TILE, "LISTING": listing, "BRACKET": listing, "FOURS": fours}
            constants |= residual_constants("")
            made.append(
                _variant(
                    *("gpu_kernels", "stream_kernel", f"{grad}, {label}", constants, warps, each * fours),
                    most_registers=gpu_stream.STREAM_REGISTERS,
                    p_grad=f"*{grad}",
                )
            )
        # Views of a flat buffer that begin anywhere.
        at_any_address = made[-3]._replace(label=f"{grad}, fours, unaligned", unaligned=("p_grad", "p_err"))
        made.append(at_any_address)
    for options in (", clip", ", clip, stats"):
        constants = {**TILE, "LISTING": True, "BRACKET": True, "FOURS": True, **residual_constants(options)}
        made.append(
            _variant(
                *("gpu_kernels", "stream_kernel", f"fp32, fours{options}", constants, warps, each),
                most_registers=gpu_stream.STREAM_REGISTERS,
                p_grad="*fp32",
            )
        )
    return made


def _select() -> list[Variant]:
    made = []
    n = 100_000_000
    for ratio in (0.0001, 0.001, 0.01, 0.1, 0.5):
        k = int(n * ratio)
        refine, emit = (
            {**TILE, "ROWS": rows, "BLOCK": block, "GROUP": gpu_select.GROUP}
            | {"BRACKET": gpu_guess.listing(n, k)}
            for rows, block in gpu.run_shapes(n, k)
        )
        refine |= {"BINS": gpu_control.BINS, "ROOM": gpu_refine.NEAR_ROOM}
        refine |= {"LEVEL_TILE": gpu_refine.LEVEL_TILE}
        refine |= {"LISTING": gpu_guess.listing(n, k)}
        made.append(
            _variant(
                *("gpu_kernels", "refine_kernel", f"{ratio}", refine, gpu_select.REFINE_WARPS),
                most_registers=TOGETHER_REGISTERS,
            )._replace(together=True)
        )
        for value, index in PAYLOADS:
            types = {"p_values": f"*{value}", "p_indices": f"*{index}"}
            label = f"{value}, {index}, {ratio}"
            made.append(
                _variant(
                    *("gpu_kernels", "emit_kernel", label, {**emit, "HINT": True}, gpu_emit.EMIT_WARPS),
                    most_registers=gpu_emit.EMIT_REGISTERS,
                    **types,
                )
            )
    return made


def _decode() -> list[Variant]:
    made = []
    for value, index in PAYLOADS:
        types = {"p_values": f"*{value}", "p_indices": f"*{index}"}
        label = f"{value}, {index}"
        add = {"ACCUMULATE": value == "fp32"}
        constants = {**add, "BLOCK": gpu_decode.BLOCK}
        made.append(_variant("gpu_decode", "scatter_kernel", label, constants, 4, **types))
        constants = {"TILE": gpu_decode.SUM_TILE, "TOUCH": True, **add}
        constants |= {"VALUE_BYTES": BYTES[value], "INDEX_BYTES": BYTES[index]}
        types |= {"p_bounds": f"*{index}"}
        for name, (block, ranks, warps) in (("few", gpu_decode.SUM_FEW), ("many", gpu_decode.SUM_MANY)):
            own = {**constants, "BLOCK": block, "RANKS": ranks}
            made.append(_variant("gpu_decode", "sum_kernel", f"{label}, {name}", own, warps, **types))
    for index in ("i32", "i64"):
        constants = {"TILE": gpu_decode.SUM_TILE, "BLOCK": gpu_decode.BOUNDS_BLOCK}
        constants |= {"WAYS": gpu_decode.BOUNDS_WAYS}
        constants |= {"INDEX_BYTES": BYTES[index]}
        types = {"p_indices": f"*{index}", "p_bounds": f"*{index}"}
        made.append(_variant("gpu_decode", "bounds_kernel", index, constants, 4, **types))
    return made


def _lists() -> list[Variant]:
    module = "gpu_list_kernels"
    aligned = {"ALIGNED": True, **TILE}
    run = {**RUN, **aligned}
    bins = {"BINS": gpu_control.BINS}
    sample = {**SAMPLE, "BINS": gpu_guess.SAMPLE_BINS}
    constants = {**sample, "BLOCK_LINES": gpu_guess.BLOCK_LINES, "BLOCK": gpu_guess.GUESS_BLOCK}
    made = [_variant(module, "list_guess_kernel", "all", constants, gpu_lists.LIST_GUESS_WARPS)]
    for grad, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        like = {"DTYPE": DTYPE_CODE[dtype], **TILE}
        constants = {**sample, **like, "BLOCK": gpu_guess.BLOCK_LINES, "RESIDUAL": 0}
        made.append(_variant(module, "list_sample_kernel", grad, constants, 4, p_like=f"*{grad}"))
        for label, where, whole in (
            ("whole", True, True),
            ("whole, clip", True, True),
            ("last", True, False),
            ("unaligned", False, True),
        ):
            residual = residual_constants(label)["RESIDUAL"]
            constants = {**like, "ALIGNED": where, "WHOLE": whole, "RESIDUAL": residual}
            label = f"{grad}, {label}"
            made.append(
                _variant(
                    *(module, "list_stream_kernel", label, constants, gpu_stream.STREAM_WARPS),
                    most_registers=gpu_stream.STREAM_REGISTERS,
                    p_like=f"*{grad}",
                )
            )
    made.append(_variant(module, "list_restore_kernel", "fp32", run, gpu_select.RUN_WARPS))
    (last, _), (shift, bits) = gpu_control.DIGITS[:2]
    constants = {**aligned, **bins, "DIGIT": 1, "LAST_SHIFT": last, "SHIFT": shift, "BITS": bits}
    made.append(_variant(module, "list_refine_kernel", "digit 1", constants, gpu_select.REFINE_WARPS))
    run = {**run, "GROUP": gpu_select.GROUP}
    constants = {**run, **bins, "DIGIT": 3, "SHIFT": gpu_control.DIGITS[3][0]}
    made.append(_variant(module, "list_count_kernel", "fp32", constants, gpu_select.RUN_WARPS))
    for value, index in PAYLOADS:
        types = {"p_values": f"*{value}", "p_indices": f"*{index}"}
        label = f"{value}, {index}"
        made.append(
            _variant(
                *(module, "list_emit_kernel", label, run, gpu_emit.EMIT_WARPS),
                most_registers=gpu_emit.EMIT_REGISTERS,
                **types,
            )
        )
    return made
