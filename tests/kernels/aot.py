"""Compiles every Triton kernel ahead of time, without a GPU, and prints what each costs as JSON.

Runs as a program of its own, because Triton compiles nothing in a process that has TRITON_INTERPRET set:

    python -m tests.kernels.aot [--all] [PATTERN]

Of every kernel all variants are compiled for one target, and the first of them for the others. With --all,
all are for each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import Any

import gck.kernels
from tests.kernels import (
    aot_chunk_topk,
    aot_index_codecs,
    aot_low_rank,
    aot_quantize,
    aot_random_k,
    aot_sign,
    aot_statistics,
    aot_topk,
)
from tests.kernels.aot_budgets import WIDE
from tests.kernels.aot_variant import Variant

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WHOLE = "sm_90"  # the target that all variants are compiled for


def variants() -> list[Variant]:
    modules = (
        *(aot_topk, aot_sign, aot_chunk_topk, aot_quantize, aot_random_k),
        *(aot_index_codecs, aot_statistics, aot_low_rank),
    )
    made = [variant for module in modules for variant in module.variants()]
    return made + _past_2_31(made)


# The size of the vector, and places in it.
SIZES, PLACES = {"n", "numel"}, {"rotation", "first"}


def sized() -> list[str]:
    """Names of the kernels that are told how long the vector is."""
    return sorted({v.name.partition("[")[0] for v in variants() if SIZES & set(v.function().arg_names)})


def _past_2_31(made: list[Variant]) -> list[Variant]:
    """One more of each kernel that is told the size of the vector: its first one, of more elements than 32
    bits can count."""
    first: dict[str, Variant] = {}
    for variant in made:
        if SIZES & set(variant.function().arg_names):
            first.setdefault(variant.name.partition("[")[0], variant)
    return [
        v._replace(label=f"{v.label}, past 2^31", types=v.types | dict.fromkeys(SIZES | PLACES, "i64"))
        for v in first.values()
    ]


def kernels() -> list[str]:
    """Names of the kernels that each compressor launches: jitted functions that no other one calls."""
    from triton import JITFunction

    own: dict[str, dict[str, str]] = {}
    for path in sorted(Path(gck.kernels.__file__).parent.glob("*/gpu*.py")):
        compressor = path.parent.name
        module = import_module(f"gck.kernels.{compressor}.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                own.setdefault(compressor, {})[name] = getsource(value.fn)
    return [
        f"{compressor}.{name}"
        for compressor, sources in own.items()
        for name in sources
        if not any(re.search(rf"\b{name}\(", text) for other, text in sources.items() if other != name)
    ]


def cost(index: int, target: str) -> tuple[str, str, dict[str, Any]]:
    """Compiles variant `index`: its name, the target, and its figures or {"error": …}."""
    variant = variants()[index]
    try:
        compiled = _compile(variant, target)
        figures = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, variant)
    except Exception:
        return variant.name, target, {"error": traceback.format_exc(limit=-3)}
    return variant.name, target, figures


def _compile(variant: Variant, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gck.kernels.common.launch import EXACT, TOGETHER_LAUNCH

    kernel = variant.function()
    names = kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    # What a launch finds of aligned tensors; every integer is do_not_specialize.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") and name not in variant.unaligned
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options: dict[str, Any] = {"num_warps": variant.num_warps, **EXACT}
    if variant.most_registers and not target.startswith("gfx"):
        options["maxnreg"] = variant.most_registers
    if variant.together:
        options |= TOGETHER_LAUNCH
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _nvidia(compiled: Any, variant: Variant) -> dict[str, Any]:
    """Instructions are looked at where they are counted, or may be of spills: it takes half the time."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(str(tools / "cuobjdump"), "--dump-resource-usage", cubin.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if found is None:
            raise ValueError(f"cuobjdump printed no resource usage: {usage}")
        registers, stack, local = map(int, found.groups())
        looked_at = variant.elements or variant.name in WIDE or stack or local
        sass = _run(str(tools / "nvdisasm"), "-c", cubin.name) if looked_at else ""
    ptx = compiled.asm["ptx"]
    return {
        **(_by_element(sass, variant.elements) if variant.elements else {}),
        **(_wide(sass) if variant.name in WIDE else {}),
        "registers": registers,
        "spills": stack + local + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        # What would change bytes: contraction, flushed denormals, approximate division.
        "inexact": sorted(
            set(re.findall(r"fma\.rn\.f(?:32|64)|\S+\.ftz\S*|div\.full\S*|\S+\.approx\S*", ptx))
        ),
    }


def _wide(sass: str) -> dict[str, int]:
    return {
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", sass)),
    }


def _by_element(sass: str, elements: int) -> dict[str, float]:
    """Figures of straight code in which a thread moves `elements` elements: every instruction counts
    once, on whatever branch it is, and padding not at all."""
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    moved = {"LDG": 0, "STG": 0}
    for name in code:
        # What is 16 bytes wide is of the tile, and 8 bytes of a narrow gradient; the list is written by
        # element.
        if name[:3] in moved and ".128" in name:
            moved[name[:3]] += 16
        elif name.startswith("LDG.E.64"):
            moved["LDG"] += 8
    return {
        "instructions_an_element": round(sum(name != "NOP" for name in code) / elements, 1),
        "bytes_read_an_element": moved["LDG"] / elements,
        "bytes_written_an_element": moved["STG"] / elements,
        "list_stores_an_element": sum(bool(re.fullmatch(r"STG\.E(\.U16)?", n)) for n in code) / elements,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"no .{name} in the metadata")
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, which the first figure counts: no memory.
    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return {"registers": field("vgpr_count"), "spills": spills}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--all", action="store_true")
    given.add_argument("pattern", nargs="?", default="")
    options = given.parse_args()
    made = variants()
    first = {variant.name.partition("[")[0]: i for i, variant in reversed(list(enumerate(made)))}.values()
    jobs = [
        (i, target)
        for i, variant in enumerate(made)
        for target in TARGETS
        if re.search(options.pattern, variant.name) and (options.all or target == WHOLE or i in first)
    ]
    report: dict[str, Any] = {"kernels": kernels(), "sized": sized(), "variants": {}}
    with ProcessPoolExecutor(2) as pool:
        for name, target, figures in pool.map(cost, *zip(*jobs, strict=True), chunksize=4):
            report["variants"].setdefault(name, {})[target] = figures
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
