"""What each kernel may take of a processor, compiled ahead of time: what it takes, and a little headroom."""

from __future__ import annotations

import triton

# Registers a thread, (NVIDIA, AMD): what the worst variant of the kernel needs, and a little headroom.
BUDGETS = {
    "common.tree_kernel": (32, 32),
    "common.sent_kernel": (40, 32),
    "common.measure_kernel": (56, 40),
    "topk.guess_kernel": (128, 96),
    "topk.stream_kernel": (96, 64),
    # Two programs of 8 warps must fit on a processor, for they wait for each other.
    "topk.refine_kernel": (128, 128),
    "topk.emit_kernel": (128, 112),
    "topk.list_sample_kernel": (48, 32),
    "topk.list_guess_kernel": (80, 64),
    "topk.list_stream_kernel": (96, 64),
    "topk.list_restore_kernel": (48, 48),
    "topk.list_refine_kernel": (64, 96),
    "topk.list_count_kernel": (48, 48),
    "topk.list_emit_kernel": (128, 112),
    "topk.scatter_kernel": (48, 32),
    "topk.bounds_kernel": (48, 32),
    "topk.sum_kernel": (64, 80),
    "sign.compress_kernel": (96, 64),
    "sign.decompress_kernel": (128, 64),
    "sign.reduce_kernel": (128, 96),
    "chunk_topk.compress_kernel": (120, 88),
    "chunk_topk.decompress_kernel": (112, 80),
    "chunk_topk.reduce_kernel": (128, 128),
    "quantize.compress_kernel": (120, 72),
    "quantize.decompress_kernel": (96, 88),
    "quantize.reduce_kernel": (96, 96),
    "random_k.compress_kernel": (80, 48),
    "random_k.spoil_kernel": (40, 32),
    "random_k.left_kernel": (40, 32),
    "random_k.decompress_kernel": (40, 40),
    "low_rank.basis_kernel": (32, 24),
    "low_rank.project_kernel": (128, 120),
    "low_rank.gram_kernel": (144, 72),
    "low_rank.orthonormal_kernel": (128, 72),
    "low_rank.back_project_kernel": (184, 88),
    "low_rank.add_parts_kernel": (72, 32),
    "low_rank.settle_kernel": (80, 80),
    "low_rank.decompress_kernel": (80, 72),
    "low_rank.next_basis_kernel": (56, 40),
    "index_codecs.low_kernel": (40, 32),
    "index_codecs.high_kernel": (48, 40),
    "index_codecs.count_kernel": (32, 24),
    "index_codecs.select_kernel": (96, 64),
    "index_codecs.split_kernel": (32, 16),
    "index_codecs.ends_kernel": (32, 24),
    "index_codecs.join_kernel": (48, 32),
}
# Variants that need not be fast: of a vector's last tile, of tensors at any address, of 64-bit indices.
RARE = {f"topk.list_stream_kernel[{grad}, last]": 128 for grad in ("fp32", "bf16")}
RARE |= {f"topk.list_stream_kernel[{grad}, unaligned]": 112 for grad in ("fp32", "bf16")}
RARE |= {"topk.sum_kernel[fp16, i64, few]": 80}
# One program of 16 warps keeps a chunk and its tree: it fits on a processor once, with 128.
RARE |= {"quantize.compress_kernel[fp32, 2 bits, mean, 8192]": 128}
# Statistics are summed before and after.
RARE |= {"quantize.compress_kernel[fp32, 4 bits, nearest, 256, clip, stats]": 72}
RARE |= {"random_k.compress_kernel[fp32, fp32, clip, stats]": 52}
# Chunks of 65,536 that are added to: one program has them on their way.
RARE |= {"chunk_topk.decompress_kernel[fp32, 1024 of 65536, 2 bits, add]": 176}
RARE |= {f"chunk_topk.compress_kernel[fp32, 64 of 4096, 2 bits{o}]": 180 for o in (", clip", ", clip, stats")}
# Eight sums of each column that a thread has; rows of any length, whose elements are moved one by one; and
# the highest rank, whose tables take what there is.
RARE |= {
    f"low_rank.project_kernel[{kind}]": 168
    for kind in (
        "fp32, rank 8, rows of 4096",
        "fp16, rank 8, rows of 4096",
        "fp32, rank 8, rows of 4096, clip",
        "fp32, rank 8, rows of 999",
    )
}
RARE |= {"low_rank.project_kernel[fp32, rank 4, rows of 100]": 136}
RARE |= {"low_rank.settle_kernel[rank 8, rows of 999]": 152}
RARE |= {f"low_rank.decompress_kernel[rank 8, rows of 999, {way}]": 128 for way in ("write", "add")}
RARE |= {"low_rank.orthonormal_kernel[rank 64]": 200, "low_rank.settle_kernel[rank 16, rows of 4096]": 120}
RARE |= {f"low_rank.decompress_kernel[rank 16, rows of 4096, {way}]": 112 for way in ("write", "add")}
# A warp that has a chunk to itself keeps all of it under way, whatever that takes.
LONE_WARPS = {
    f"chunk_topk.compress_kernel[{grad}, 64 of 4096, {bits} bits]"
    for grad, bits in (
        ("fp32", 2),
        ("fp32", 4),
        ("bf16", 16),
    )
} | {f"chunk_topk.compress_kernel[fp32, 64 of 4096, 2 bits{o}]" for o in (", clip", ", clip, stats")}
LONE_WARPS |= {
    f"chunk_topk.reduce_kernel[64 of 4096 to 64, {bits}]"
    for bits in ("16 bits, product", "4 bits, quotient", "16 bits, none, no residual")
}
LONE = (255, 216)
# Bytes of stack, and instructions that use it: a word or two where that lets one more program fit on a
# processor, and more in variants for vectors past 2^31 elements.
SPILLED: tuple[tuple[str, str, int], ...] = (
    (r"topk\.list_stream_kernel\[(fp32|bf16), (whole|unaligned)\]", "sm_.*", 12),
    (r"topk\.guess_kernel\[fp32.*\]", "sm_(90|100)", 8),
    (r"topk\.sum_kernel\[(fp32|bf16), i32, few.*\]", "sm_.*", 40),
    # Launches keep threads to the registers of whole groups; the one that the end cuts short spills masks.
    (r"sign\.compress_kernel\[.*\]", "sm_.*", 240),
    (r"(sign|quantize)\.(compress|decompress|reduce)_kernel\[.*\]", "sm_.*", 220),
    # 4096 entries of a chunk, selected by 16 warps of 128 registers a thread: the same spills without ranks.
    (r"chunk_topk\.reduce_kernel\[1024 of 65536 to 4096, .*\]", ".*", 830),
    (r"topk\.sum_kernel\[fp16, i64, few\]", "sm_90", 12),
    (r"topk\.list_stream_kernel\[.*, last\]", "sm_(90|100)", 26),
    (r"topk\.(list_)?emit_kernel\[(fp32|bf16), i32.*\]", "sm_.*", 60),
    (r"topk\.emit_kernel\[fp16, i64, .*\]", "sm_.*", 90),
    (r"topk\.list_emit_kernel\[fp16, i64\]", "sm_.*", 36),
)
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
STREAMS = {f"topk.stream_kernel[{grad}, fours]": size for grad, size in SIZES.items()}
# (loads, stores) of 16 bytes that a thread has for its 16 elements: 4 of err each way, and 4 of an fp32
# gradient; a narrow gradient is read 8 bytes at a time, so that whoever loads an element also stores it.
WIDE = {
    "topk.stream_kernel[fp32, fours]": (8, 4),
    "topk.stream_kernel[bf16, fours]": (4, 4),
    "sign.compress_kernel[fp32, 256]": (8, 4),
    # Of 16 elements only the residual is wide.
    "sign.reduce_kernel[256, product]": (4, 4),
    "quantize.compress_kernel[fp32, 8 bits, nearest, 256]": (8, 4),
    "random_k.compress_kernel[fp32, fp32]": (8, 4),
    # Of 8 elements: rows of left are of any length.
    **{f"low_rank.settle_kernel[rank 4, rows of 4096{many}]": (2 + 4 * 2, 2) for many in ("", ", many")},
    "quantize.reduce_kernel[4 bits, nearest, 256, product]": (4, 4),
}
INSTRUCTIONS = 45  # an element, of the stream
# Of streams that do more: options of the residual, and elements moved one by one, which lie at any address.
MORE_INSTRUCTIONS = {
    "topk.stream_kernel[fp32, fours, clip]": 46,
    "topk.stream_kernel[fp32, fours, clip, stats]": 67,
    **{f"topk.stream_kernel[{grad}, fours, unaligned]": 70 for grad in SIZES},
}
# Older versions count histograms by warp votes and keep more of a reduction in registers.
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    BUDGETS |= {
        "topk.list_refine_kernel": (80, 96),
        "sign.compress_kernel": (128, 64),
        # As many programs fit on a processor as with 120: two of 8 warps, one of 16.
        "chunk_topk.compress_kernel": (128, 80),
        "chunk_topk.decompress_kernel": (128, 72),
        "quantize.compress_kernel": (144, 64),
        "topk.guess_kernel": (168, 128),
        "index_codecs.high_kernel": (56, 48),
    }
    RARE |= {f"topk.stream_kernel[{grad}, last]": 112 for grad in ("fp32", "bf16", "fp16")}
    RARE |= {
        "random_k.compress_kernel[fp32, fp32, clip]": 104,
        "random_k.compress_kernel[fp32, fp32, past 2^31]": 104,
    }
    RARE |= {"random_k.compress_kernel[fp32, fp32, clip, stats]": 128}
    SPILLED = (
        (r"topk\.stream_kernel\[fp32, fours, clip, stats\]", "sm_80", 10),
        (r"topk\.stream_kernel\[(bf16|fp16), fours\]", "sm_100", 12),
        (r"topk\.stream_kernel\[.*, last\]", "sm_(90|100)", 26),
        (r"topk\.refine_kernel\[.*\]", "sm_80", 30),
        (r"quantize\.reduce_kernel\[8 bits, nearest, 256, product\]", "sm_100", 12),
        (r"topk\.list_guess_kernel\[all\]", "sm_80", 12),
        (r"topk\.list_emit_kernel\[fp16, i64\]", "sm_(90|100)", 96),
        (r"random_k\.compress_kernel\[fp32, fp32\]", "sm_80", 16),
        *SPILLED,
    )
    MORE_INSTRUCTIONS |= {
        "topk.stream_kernel[fp32, fours, clip]": 48,
        "topk.stream_kernel[fp32, fours, clip, stats]": 69,
    }
