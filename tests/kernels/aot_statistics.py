"""Specialisations of the kernels that add up statistics."""

from __future__ import annotations

from gck.kernels.common.gpu_statistics import MEASURED, WARPS
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    types = {"p_sums": "*fp64", "p_out": "*fp64", "p_err": "*fp32", "count": "i32", "k": "i32"}
    made = [Variant("common", "gpu_statistics", "tree_kernel", "", types, {}, WARPS)]
    for value, index in (("fp32", "i32"), ("bf16", "i32"), ("fp16", "i64")):
        held = types | {"p_values": f"*{value}", "p_indices": f"*{index}"}
        constants = {"ROUNDED": value != "fp32"}
        made.append(
            Variant("common", "gpu_statistics", "sent_kernel", f"{value}, {index}", held, constants, WARPS)
        )
    for grad, acc, residual in (("fp32", True, "clip"), ("bf16", True, ""), ("fp32", False, "")):
        constants = {"SIZE": MEASURED, "ACC": acc, "RESIDUAL": residual_constants(residual)["RESIDUAL"]}
        held = {"p_grad": f"*{grad}", "p_err": "*fp32", "n": "i64"} | RESIDUAL_TYPES
        label = f"{grad}, {'acc' if acc else 'residual'}"
        made.append(Variant("common", "gpu_statistics", "measure_kernel", label, held, constants, WARPS))
    return made
