"""Specialisations of the kernels of sign."""

from __future__ import annotations

from gck.kernels.sign import Sign, gpu, gpu_sum
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    payload = {"p_words": "*i32", "p_scales": "*fp32"}
    made = []
    for grad, chunk, options in (
        ("fp32", 32, ""),
        ("fp32", 256, ""),
        ("bf16", 256, ""),
        ("fp32", 1024, ""),
        ("fp32", 8192, ""),
        ("fp32", 256, ", clip"),
        ("fp32", 256, ", clip, stats"),
    ):
        chunks = max(gpu.WARP_ELEMENTS // chunk, 1)
        made.append(
            Variant(
                "sign",
                "gpu",
                "compress_kernel",
                f"{grad}, {chunk}{options}",
                {
                    **payload,
                    **RESIDUAL_TYPES,
                    "p_grad": f"*{grad}",
                    "p_err": "*fp32",
                    "p_nonfinite": "*i64",
                    "n": "i32",
                    "shard_chunks": "i32",
                    "row_units": "i32",
                },
                {"CHUNKS": chunks, "LEVELS": chunk.bit_length() - 1, **residual_constants(options)},
                chunks * chunk // gpu.WARP_ELEMENTS,
            )
        )
    for accumulate in (False, True):
        made.append(
            Variant(
                "sign",
                "gpu",
                "decompress_kernel",
                "add" if accumulate else "write",
                {**payload, "p_out": "*fp32", "n": "i32", "alpha": "fp32"},
                {"LEVELS": 8, "ACCUMULATE": accumulate, "TILE": gpu.TILE},
                4,
            )
        )
    types = payload | {"p_err": "*fp32", "p_from_words": "*i32", "p_from_scales": "*fp32"}
    types |= {"p_nonfinite": "*i64", "n": "i32", "ranks": "i32", "row_units": "i32", "number": "fp32"}
    for clear in (False, True):
        constants, num_warps = gpu_sum.sum_options(Sign(), clear=clear)
        label = "to zeros" if clear else "add"
        made.append(
            Variant(
                "sign",
                "gpu_sum",
                "sum_kernel",
                label,
                types | {"p_out": "*fp32", "alpha": "fp32"},
                constants,
                num_warps,
            )
        )
    for chunk, kind, residual in (
        (32, "product", True),
        (256, "none", True),
        (256, "product", True),
        (256, "quotient", True),
        (256, "product", False),
        (1024, "product", True),
        (8192, "quotient", True),
    ):
        constants, num_warps = gpu_sum.reduce_options(Sign(chunk), kind, residual=residual)
        label = f"{chunk}, {kind}{'' if residual else ', no residual'}"
        made.append(Variant("sign", "gpu_sum", "reduce_kernel", label, types, constants, num_warps))
    return made
