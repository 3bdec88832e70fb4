"""Specialisations of the kernels of chunk top-k."""

from __future__ import annotations

from gck.kernels.chunk_topk import ChunkTopK, gpu, gpu_decode
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
            constants, num_warps = gpu_decode.decompress_options(compressor, clear=clear, add=add)
            name = f"{label}, {'add' if add else 'write'}{' to zeros' if clear else ''}"
            made.append(
                Variant("chunk_topk", "gpu_decode", "decompress_kernel", name, held, constants, num_warps)
            )
    return made
