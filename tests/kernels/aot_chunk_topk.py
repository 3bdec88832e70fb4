"""Specialisations of the kernels of chunk top-k."""

from __future__ import annotations

from gck.kernels.chunk_topk import ChunkTopK, gpu, gpu_decode, gpu_reduce
from tests.kernels.aot_variant import RESIDUAL_TYPES, Variant, residual_constants


def variants() -> list[Variant]:
    types = {"p_grad": "*fp32", "p_err": "*fp32", "p_out": "*fp32", "p_position": "*i16", "p_scales": "*fp32"}
    types |= {"p_nonfinite": "*i64", "alpha": "fp32", "ranks": "i32", "row_units": "i32", "n": "i32"}
    types |= {"shard_chunks": "i32", **RESIDUAL_TYPES}
    fields = {32: "*fp32", 16: "*bf16", 8: "*u8", 4: "*u8", 2: "*u8"}
    made = []
    for grad, k, chunk, bits, options in (
        ("fp32", 64, 4096, 2, ""),
        ("fp32", 64, 4096, 4, ""),
        ("bf16", 64, 4096, 16, ""),
        ("fp32", 4, 64, 8, ""),
        ("bf16", 4, 64, 4, ""),
        ("bf16", 128, 8192, 2, ""),
        ("fp32", 128, 8192, 32, ""),
        ("fp32", 1024, 65536, 2, ""),
        ("fp32", 512, 1024, 16, ""),
        ("fp32", 64, 4096, 2, ", clip"),
        ("fp32", 64, 4096, 2, ", clip, stats"),
        ("fp32", 4, 64, 8, ", clip, stats"),
    ):
        compressor = ChunkTopK(k, chunk, bits)
        held = types | {"p_values": fields[bits], "p_indices": "*u8" if compressor.packs_indices else "*i16"}
        label = f"{grad}, {k} of {chunk}, {bits} bits{options}"
        constants, num_warps = gpu.compress_options(compressor)
        constants |= residual_constants(options)
        made.append(
            Variant(
                "chunk_topk",
                "gpu",
                "compress_kernel",
                label,
                held | {"p_grad": f"*{grad}"},
                constants,
                num_warps,
            )
        )
        if options:
            continue
        for clear, add in ((True, True), (False, True)) if bits == 2 else ((True, False),):
            constants, num_warps, _ = gpu_decode.decompress_options(
                compressor, 8 if add else 1, clear=clear, add=add
            )
            name = f"{label}, {'add' if add else 'write'}{' to zeros' if clear else ''}"
            made.append(
                Variant("chunk_topk", "gpu_decode", "decompress_kernel", name, held, constants, num_warps)
            )
    types |= {"p_scratch": "*fp32", "p_from_scales": "*fp32", "number": "fp32"}
    for k, chunk, bits, server_k, kind, options in (
        (64, 4096, 16, 64, "product", ""),
        (64, 4096, 2, 256, "product", ""),
        (64, 4096, 4, 64, "quotient", ""),
        (64, 4096, 16, 64, "none", ", no residual"),
        (4, 64, 8, 16, "product", ""),
        (32, 2048, 4, 32, "product", ""),
        (16, 1024, 4, 64, "quotient", ""),
        (128, 8192, 32, 512, "quotient", ""),
        (1024, 65536, 2, 4096, "product", ""),
        (64, 4096, 2, 256, "product", ", clip"),
    ):
        compressor = ChunkTopK(k, chunk, bits)
        server = ChunkTopK(server_k, chunk, bits)
        held = types | {"p_values": fields[bits], "p_indices": "*u8" if compressor.packs_indices else "*i16"}
        held |= {f"p_from_{name}": held[f"p_{name}"] for name in ("values", "indices")}
        constants, num_warps, most, _ = gpu_reduce.reduce_options(
            compressor, server, 8, kind, residual_constants(options)["RESIDUAL"]
        )
        label = f"{k} of {chunk} to {server_k}, {bits} bits, {kind}{options}"
        made.append(
            Variant(
                *("chunk_topk", "gpu_reduce", "reduce_kernel", label, held, constants, num_warps),
                most_registers=most,
            )
        )
    return made
