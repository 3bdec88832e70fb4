"""Specialisations of the kernels of sign."""

from __future__ import annotations

from gck.kernels.sign import Sign, gpu, gpu_decode, gpu_reduce
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    payload = {"p_words": "*i32", "p_scales": "*fp32"}
    made = []
    for grad, chunk, options in (
        ("fp32", 32, ""),
        ("fp32", 256, ""),
        ("bf16", 256, ""),
        ("fp32", 1024, ""),
        ("fp32", 4096, ""),
        ("fp32", 8192, ""),
        ("fp32", 256, ", clip"),
        ("fp32", 256, ", clip, stats"),
    ):
        constants, num_warps, most = gpu.compress_options(Sign(chunk), stats="stats" in options)
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
                constants | residual_constants(options),
                num_warps,
                most_registers=most,
            )
        )
    types = payload | RESIDUAL_TYPES | {"p_err": "*fp32", "p_from_words": "*i32", "p_from_scales": "*fp32"}
    types |= {"p_nonfinite": "*i64", "n": "i32", "ranks": "i32", "row_units": "i32", "number": "fp32"}
    decoded = types | {"p_out": "*fp32", "alpha": "fp32"}
    for ranks, clear, add in ((1, False, False), (1, False, True), (8, True, True), (8, False, True)):
        constants, num_warps, most = gpu_decode.decompress_options(Sign(), clear=clear, add=add, ranks=ranks)
        label = f"{ranks}, {'add' if add else 'write'}{' to zeros' if clear else ''}"
        made.append(
            Variant(
                "sign",
                "gpu_decode",
                "decompress_kernel",
                label,
                decoded,
                constants,
                num_warps,
                most_registers=most,
            )
        )
    for chunk, kind, options in (
        (32, "product", ""),
        (256, "none", ""),
        (256, "product", ""),
        (256, "quotient", ""),
        (256, "product", ", no residual"),
        (1024, "product", ""),
        (8192, "quotient", ""),
        (256, "product", ", clip"),
    ):
        constants, num_warps, most = gpu_reduce.reduce_options(
            Sign(chunk), kind, residual_constants(options)["RESIDUAL"]
        )
        label = f"{chunk}, {kind}{options}"
        made.append(
            Variant(
                "sign", "gpu_reduce", "reduce_kernel", label, types, constants, num_warps, most_registers=most
            )
        )
    return made
