"""Compiles every Triton kernel ahead of time, without a GPU, and prints what each costs as JSON.

Runs as a program of its own, because Triton compiles nothing in a process that has TRITON_INTERPRET set.
"""

from __future__ import annotations

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
from typing import Any, NamedTuple

import gck.kernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Variant(NamedTuple):
    """One specialisation of a kernel: types of its arguments by name, and its compile-time values."""

    module: str
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.kernel}[{self.label}]"


def modules() -> dict[str, Any]:
    """The module with the GPU kernels of each compressor that has one."""
    folder = Path(gck.kernels.__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/gpu.py"))
    return {name: import_module(f"gck.kernels.{name}.gpu") for name in names}


def kernels(module: Any) -> list[str]:
    """Names of the kernels that `module` launches: its jitted functions that no other one calls."""
    from triton import JITFunction

    jitted = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    own = {name: value for name, value in jitted.items() if value.fn.__module__ == module.__name__}
    sources = {name: getsource(value.fn) for name, value in own.items()}
    return [
        name
        for name in own
        if not any(re.search(rf"\b{name}\(", text) for other, text in sources.items() if other != name)
    ]


def variants() -> list[Variant]:
    return [*_topk(), *_sign(), *_chunk_topk()]


def _topk() -> list[Variant]:
    from gck.kernels.topk import gpu

    vector = {"n": "i32", "tiles": "i32", "p_control": "*i64", "p_counts": "*i64"}
    tile = {"TILE": gpu.TILE}
    made = [
        Variant(
            "topk",
            "stream_kernel",
            grad,
            {**vector, "p_grad": f"*{grad}", "p_err": "*fp32", "k": "i32"},
            {**tile, "BINS": gpu.BINS},
            8,
        )
        for grad in ("fp32", "bf16", "fp16")
    ]
    for digit in range(1, len(gpu.DIGITS)):
        shift, bits = gpu.DIGITS[digit]
        constants = {"DIGIT": digit, "LAST_SHIFT": gpu.DIGITS[digit - 1][0], "SHIFT": shift, "BITS": bits}
        made.append(
            Variant(
                "topk",
                "refine_kernel",
                f"digit {digit}",
                {**vector, "p_source": "*fp32"},
                {**tile, **constants, "BINS": gpu.BINS},
                8,
            )
        )
    constants = {"DIGIT": len(gpu.DIGITS) - 1, "SHIFT": gpu.DIGITS[-1][0], "BINS": gpu.BINS}
    made.append(
        Variant("topk", "count_kernel", "fp32", {**vector, "p_source": "*fp32"}, {**tile, **constants}, 8)
    )
    for value, index in (("fp32", "i32"), ("bf16", "i32"), ("fp16", "i64")):
        payload = {"p_values": f"*{value}", "p_indices": f"*{index}"}
        emit = {"p_err": "*fp32", "p_nonfinite": "*i64"}
        made.append(
            Variant(
                "topk",
                "emit_kernel",
                f"{value}, {index}",
                {**vector, **payload, **emit},
                {"TILE": gpu.EMIT_TILE, "PROGRAMS": gpu.MAX_PROGRAMS},
                8,
            )
        )
        made.append(
            Variant(
                "topk",
                "scatter_kernel",
                f"{value}, {index}",
                {**payload, "p_out": "*fp32", "n": "i32", "k": "i32", "alpha": "fp32"},
                {"ACCUMULATE": value == "fp32", "BLOCK": gpu.BLOCK},
                4,
            )
        )
    return made


def _sign() -> list[Variant]:
    from gck.kernels.sign import gpu

    payload = {"p_words": "*i32", "p_scales": "*fp32"}
    made = []
    for grad, chunk in (("fp32", 32), ("fp32", 256), ("bf16", 256), ("fp32", 1024), ("fp32", 8192)):
        chunks = max(gpu.WARP_ELEMENTS // chunk, 1)
        made.append(
            Variant(
                "sign",
                "compress_kernel",
                f"{grad}, {chunk}",
                {
                    **payload,
                    "p_grad": f"*{grad}",
                    "p_err": "*fp32",
                    "p_nonfinite": "*i64",
                    "n": "i32",
                    "shard_chunks": "i32",
                    "row_units": "i32",
                },
                {"CHUNKS": chunks, "LEVELS": chunk.bit_length() - 1},
                chunks * chunk // gpu.WARP_ELEMENTS,
            )
        )
    for accumulate in (False, True):
        made.append(
            Variant(
                "sign",
                "decompress_kernel",
                "add" if accumulate else "write",
                {**payload, "p_out": "*fp32", "n": "i32", "alpha": "fp32"},
                {"LEVELS": 8, "ACCUMULATE": accumulate, "TILE": gpu.TILE},
                4,
            )
        )
    return made


def _chunk_topk() -> list[Variant]:
    from gck.kernels.chunk_topk import ChunkTopK, gpu

    types = {"p_grad": "*fp32", "p_err": "*fp32", "p_out": "*fp32", "p_position": "*i16", "p_scales": "*fp32"}
    types |= {"p_nonfinite": "*i64", "alpha": "fp32", "ranks": "i32", "row_units": "i32", "n": "i32"}
    types |= {"shard_chunks": "i32"}
    fields = {32: "*fp32", 16: "*bf16", 8: "*u8", 4: "*u8", 2: "*u8"}
    made = []
    for grad, k, chunk, bits in (
        ("fp32", 64, 4096, 2),
        ("fp32", 64, 4096, 4),
        ("bf16", 64, 4096, 16),
        ("fp32", 4, 64, 8),
        ("bf16", 4, 64, 4),
        ("bf16", 128, 8192, 2),
        ("fp32", 128, 8192, 32),
        ("fp32", 1024, 65536, 2),
    ):
        compressor = ChunkTopK(k, chunk, bits)
        held = types | {"p_values": fields[bits], "p_indices": "*u8" if compressor.packs_indices else "*i16"}
        label = f"{grad}, {k} of {chunk}, {bits} bits"
        constants, num_warps = gpu.compress_options(compressor, 4 if grad == "fp32" else 2)
        made.append(
            Variant(
                "chunk_topk", "compress_kernel", label, held | {"p_grad": f"*{grad}"}, constants, num_warps
            )
        )
        for clear, add in ((True, True), (False, True)) if bits == 2 else ((True, False),):
            constants, num_warps = gpu.decompress_options(compressor, clear=clear, add=add)
            name = f"{label}, {'add' if add else 'write'}{' to zeros' if clear else ''}"
            made.append(Variant("chunk_topk", "decompress_kernel", name, held, constants, num_warps))
    return made


def cost(index: int, target: str) -> tuple[str, str, dict[str, Any]]:
    """Compiles variant `index`: its name, the target, and its figures or {"error": …}."""
    variant = variants()[index]
    try:
        compiled = _compile(variant, target)
        figures = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    except Exception:
        return variant.name, target, {"error": traceback.format_exc(limit=-3)}
    return variant.name, target, figures


def _compile(variant: Variant, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gck.kernels.common.launch import EXACT

    kernel = getattr(modules()[variant.module], variant.kernel)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    # What a launch finds of aligned tensors; every integer is do_not_specialize.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": variant.num_warps, **EXACT}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _nvidia(compiled: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(str(tools / "cuobjdump"), "--dump-resource-usage", cubin.name)
        sass = _run(str(tools / "nvdisasm"), "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {usage}")
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(found[1]),
        "spills": int(found[2]) + int(found[3]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", sass)),
        # What would change bytes: contraction, flushed denormals, approximate division.
        "inexact": sorted(set(re.findall(r"fma\.rn\.f32|\S+\.ftz\S*|div\.full\S*|\S+\.approx\S*", ptx))),
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
    known = variants()
    jobs = [(index, target) for index in range(len(known)) for target in TARGETS]
    report: dict[str, Any] = {
        "kernels": [f"{name}.{kernel}" for name, module in modules().items() for kernel in kernels(module)],
        "variants": {},
    }
    with ProcessPoolExecutor(2) as pool:
        for name, target, figures in pool.map(cost, *zip(*jobs, strict=True), chunksize=4):
            report["variants"].setdefault(name, {})[target] = figures
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
