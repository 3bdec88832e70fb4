"""Specialisations of the kernels of low rank."""

from __future__ import annotations

from typing import Any

from gck.kernels.low_rank import (
    gpu,
    gpu_back_project,
    gpu_basis,
    gpu_decode,
    gpu_many,
    gpu_orthonormal,
    gpu_project,
)
from tests.kernels.aot_variant import Variant, residual_constants

# Lengths of rows: whole tiles, 16 bytes, any.
COLUMNS = (4096, 100, 999)


def kind_of(label: str) -> int:
    """What a label says of how many matrices there are, and where."""
    kind = gpu_many.MANY if "anywhere" in label else gpu_many.ALIGNED if "many" in label else gpu_many.ONE
    return int(kind.value)


def variants() -> list[Variant]:
    pointers = ("p_err", "p_acc", "p_out", "p_basis", "p_left", "p_right", "p_following", "p_parts", "p_clip")
    types = dict.fromkeys(pointers, "*fp32") | {"p_gram": "*fp64", "p_nonfinite": "*i64", "p_table": "*i64"}
    numbers = ("n", "rows", "units", "rank", "columns", "count", "parts", "key_0", "key_1")
    types |= dict.fromkeys(numbers, "i32")
    types |= {"decay": "fp32", "alpha": "fp32"}

    def variant(
        module: str, kernel: str, label: str, constants: dict[str, Any], num_warps: int, grad: str = "fp32"
    ) -> Variant:
        held = types | {"p_grad": f"*{grad}"}
        if kernel != "basis_kernel":
            constants = constants | {"KIND": kind_of(label)}
        return Variant("low_rank", module, kernel, label, held, constants, num_warps)

    made = [variant("gpu", "basis_kernel", "", {"TILE": gpu.TILE}, gpu.WARPS)]
    for grad, rank, columns, options in (
        ("fp32", 4, COLUMNS[0], ""),
        ("fp32", 4, COLUMNS[0], ", many"),
        ("fp32", 4, COLUMNS[0], ", many, anywhere"),
        ("fp32", 8, COLUMNS[0], ""),
        ("bf16", 4, COLUMNS[0], ""),
        ("fp16", 8, COLUMNS[0], ""),
        ("fp32", 4, COLUMNS[1], ""),
        ("fp32", 8, COLUMNS[2], ""),
        ("bf16", 4, COLUMNS[2], ""),
        ("fp32", 8, COLUMNS[0], ", clip"),
        ("fp32", 64, COLUMNS[0], ", others"),
    ):
        constants = gpu_project.project_options(columns, rank) | {"FIRST": "others" not in options}
        constants["RESIDUAL"] = residual_constants(options)["RESIDUAL"]
        label = f"{grad}, rank {rank}, rows of {columns}{options}"
        made.append(variant("gpu_project", "project_kernel", label, constants, gpu_project.WARPS, grad))
    constants, warps = {"TILES": gpu_orthonormal.TILES}, gpu_orthonormal.WARPS
    for many in ("", "many"):
        made.append(variant("gpu_orthonormal", "gram_kernel", many, constants, warps))
    for rank, many in ((1, ""), (2, ""), (4, ""), (4, ", many"), (16, ""), (64, "")):
        constants, warps = gpu_orthonormal.orthonormal_options(rank)
        made.append(variant("gpu_orthonormal", "orthonormal_kernel", f"rank {rank}{many}", constants, warps))
    for rank, columns, many in (
        (4, 4096, ""),
        (4, 4096, ", many"),
        (8, 4096, ""),
        (4, 100, ""),
        (8, 999, ""),
    ):
        constants = gpu_back_project.back_project_options(columns, rank)
        label = f"rank {rank}, rows of {columns}{many}"
        made.append(variant("gpu_back_project", "back_project_kernel", label, constants, 1))
    constants = {"BLOCK": gpu_back_project.PARTS, "TOGETHER": gpu_back_project.TOGETHER}
    for many in ("", "many"):
        made.append(variant("gpu_back_project", "add_parts_kernel", many, constants, 1))
        constants_of_basis = {"BLOCK": gpu_basis.BLOCK}
        made.append(variant("gpu_basis", "next_basis_kernel", many, constants_of_basis, gpu_basis.WARPS))
    for rank, columns, many in (
        (4, 4096, ""),
        (4, 4096, ", many"),
        (8, 4096, ""),
        (16, 4096, ""),
        (4, 100, ""),
        (8, 999, ""),
    ):
        constants = gpu_decode.decode_options(columns, rank)
        label = f"rank {rank}, rows of {columns}{many}"
        made.append(variant("gpu_decode", "settle_kernel", label, constants, gpu_decode.WARPS))
        for add in (False, True):
            made.append(
                variant(
                    "gpu_decode",
                    "decompress_kernel",
                    f"{label}, {'add' if add else 'write'}",
                    constants | {"ADD": add},
                    gpu_decode.WARPS,
                )
            )
    return made
