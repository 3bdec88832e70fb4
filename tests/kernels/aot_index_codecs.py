"""Specialisations of the kernels of index codecs."""

from __future__ import annotations

from gck.coded_layout import BLOCK
from gck.kernels.index_codecs import gpu
from tests.kernels.aot_variant import Variant

WIDE = ("high_kernel", "select_kernel", "join_kernel")


def variants() -> list[Variant]:
    numbers = (
        "k",
        "low_bits",
        "words",
        "steps",
        "high_bits",
        "blocks",
        "row_units",
        "n",
        "low_words",
        "out_row",
    )
    types = dict.fromkeys(numbers, "i32")
    types |= {"p_low": "*i64", "p_high": "*i32", "p_counts": "*i32", "p_stops": "*i64", "p_locals": "*i16"}
    made = []
    for index, size in (("i32", 4), ("i64", 8)):
        # As beyond 2^31 - 1 elements.
        held = types | (dict.fromkeys(("k", "n", "high_bits", "words"), "i64") if index == "i64" else {})
        held |= dict.fromkeys(("p_indices", "p_ends", "p_out"), f"*{index}")
        constants = {
            "low_kernel": {"WORDS": gpu.WORDS},
            "high_kernel": {"ENTRIES": gpu.ENTRIES},
            "count_kernel": {"WORDS": gpu.SELECT_WORDS, "BLOCKS": gpu.COUNT_BLOCKS},
            "select_kernel": {"WORDS": gpu.SELECT_WORDS},
            "split_kernel": {"ENTRIES": gpu.ENTRIES},
            "ends_kernel": {"SIZE": BLOCK, "ENDS": gpu.ENDS},
            "join_kernel": {"SIZE": BLOCK, "INDEX_BYTES": size, "JOINED": gpu.JOINED},
        }
        made += [
            Variant("index_codecs", "gpu", kernel, index, held, values, gpu.WARPS)
            for kernel, values in constants.items()
            if index == "i32" or kernel in WIDE
        ]
    return made
