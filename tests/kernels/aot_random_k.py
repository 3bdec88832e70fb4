"""Specialisations of the kernels of random-k."""

from __future__ import annotations

from gck.kernels.random_k import gpu
from gck.kernels.random_k.gpu_ring import RING
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    types = {"p_err": "*fp32", "p_out": "*fp32", "p_spoilt": "*u8", "p_nonfinite": "*i64"}
    types |= dict.fromkeys((*RING, "ranks", "row_units"), "i32")
    types |= {"factor": "fp32", "alpha": "fp32", **RESIDUAL_TYPES}
    made = []

    def add(kernel: str, label: str, held: dict[str, str], **constants: object) -> None:
        made.append(Variant("random_k", "gpu", kernel, label, held, constants, gpu.WARPS))

    for grad, value in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")):
        held = types | {"p_grad": f"*{grad}", "p_values": f"*{value}"}
        for options in ("", ", clip", ", clip, stats") if grad == value else ("",):
            constants = {"TILE": gpu.TILE, "SLOTS": gpu.SLOTS, **residual_constants(options)}
            add("compress_kernel", f"{grad}, {value}{options}", held, **constants)
    add("left_kernel", "", types, TILE=gpu.TILE)
    for value in ("fp32", "bf16", "fp16"):
        add("spoil_kernel", value, types | {"p_values": f"*{value}"}, BLOCK=gpu.SPOIL_BLOCK)
        for clear, adds in ((True, False), (True, True), (False, True)):
            name = f"{'add' if adds else 'write'}{' to zeros' if clear else ''}"
            held = types | {"p_values": f"*{value}"}
            label = f"{value}, {name}"
            constants = {"TILE": gpu.TILE, "SLOTS": gpu.SLOTS, "CLEAR": clear, "ADD": adds}
            add("decompress_kernel", label, held, **constants)
    return made
