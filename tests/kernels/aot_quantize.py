"""Specialisations of the kernels of quantize."""

from __future__ import annotations

from gck.kernels.quantize import Quantize, gpu, gpu_decode, gpu_reduce
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    types = {"p_err": "*fp32", "p_out": "*fp32", "p_codes": "*u8", "p_scales": "*fp32", "p_nonfinite": "*i64"}
    types |= dict.fromkeys(
        ("n", "shard_chunks", "row_units", "key_0", "key_1", "first_chunk", "ranks"), "i32"
    )
    types |= {"alpha": "fp32", **RESIDUAL_TYPES}
    made = []
    for grad, compressor, options in (
        ("fp32", Quantize(8), ""),
        ("bf16", Quantize(4), ""),
        ("fp32", Quantize(4, rounding="stochastic", seed=0), ""),
        ("bf16", Quantize(8, 32, rounding="stochastic", seed=0), ""),
        ("fp32", Quantize(2, 1024, rounding="stochastic", seed=0), ""),
        ("fp32", Quantize(2, scale="mean"), ""),
        ("fp32", Quantize(2, 8192, scale="mean"), ""),
        ("fp32", Quantize(4, 8192), ""),
        ("fp32", Quantize(4), ", clip"),
        ("fp32", Quantize(4), ", clip, stats"),
    ):
        constants, num_warps, most = gpu.compress_options(compressor, stats="stats" in options)
        constants |= residual_constants(options)
        kind = "mean" if compressor.two_levels else compressor.rounding
        label = f"{grad}, {compressor.bits} bits, {kind}, {compressor.chunk_size}{options}"
        held = types | {"p_grad": f"*{grad}"}
        made.append(
            Variant(
                "quantize", "gpu", "compress_kernel", label, held, constants, num_warps, most_registers=most
            )
        )
    for compressor in (Quantize(8), Quantize(4), Quantize(2), Quantize(2, scale="mean")):
        for ranks, clear, add in ((1, False, False), (1, False, True), (8, True, True)):
            constants, num_warps, most = gpu_decode.decompress_options(
                compressor, clear=clear, add=add, ranks=ranks
            )
            name = f"{ranks}, {'add' if add else 'write'}{' to zeros' if clear else ''}"
            label = f"{compressor.bits} bits, {compressor.scale}, {name}"
            made.append(
                Variant(
                    "quantize",
                    "gpu_decode",
                    "decompress_kernel",
                    label,
                    types,
                    constants,
                    num_warps,
                    most_registers=most,
                )
            )
    types |= {"p_from_codes": "*u8", "p_from_scales": "*fp32", "number": "fp32"}
    for compressor, kind, options in (
        (Quantize(8), "product", ""),
        (Quantize(4), "none", ""),
        (Quantize(4), "product", ""),
        (Quantize(4), "quotient", ""),
        (Quantize(2), "product", ", no residual"),
        (Quantize(4, 32, rounding="stochastic", seed=0), "product", ""),
        (Quantize(8, 1024, rounding="stochastic", seed=0), "quotient", ""),
        (Quantize(2, scale="mean"), "product", ""),
        (Quantize(2, 8192, scale="mean"), "quotient", ""),
        (Quantize(8, 8192), "quotient", ""),
        (Quantize(4), "product", ", clip"),
    ):
        constants, num_warps, most = gpu_reduce.reduce_options(
            compressor, compressor.server_for(2), kind, residual_constants(options)["RESIDUAL"]
        )
        rounding = "mean" if compressor.two_levels else compressor.rounding
        label = f"{compressor.bits} bits, {rounding}, {compressor.chunk_size}, {kind}{options}"
        made.append(
            Variant(
                "quantize",
                "gpu_reduce",
                "reduce_kernel",
                label,
                types,
                constants,
                num_warps,
                most_registers=most,
            )
        )
    return made
