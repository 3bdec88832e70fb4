"""Specialisations of the kernels that add up statistics."""

from __future__ import annotations

from gck.kernels.common.gpu_statistics import WARPS
from tests.kernels.aot_variant import Variant


def variants() -> list[Variant]:
    types = {"p_sums": "*fp64", "p_out": "*fp64", "p_err": "*fp32", "count": "i32", "k": "i32"}
    made = [Variant("common", "gpu_statistics", "tree_kernel", "", types, {}, WARPS)]
    for value, index in (("fp32", "i32"), ("bf16", "i32"), ("fp16", "i64")):
        held = types | {"p_values": f"*{value}", "p_indices": f"*{index}"}
        constants = {"ROUNDED": value != "fp32"}
        made.append(
            Variant("common", "gpu_statistics", "sent_kernel", f"{value}, {index}", held, constants, WARPS)
        )
    return made
