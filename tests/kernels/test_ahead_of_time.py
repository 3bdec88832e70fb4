"""Every Triton kernel compiles for every target, in its register budget, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Registers a thread, (NVIDIA, AMD): what the worst variant of the kernel needs, and a little headroom.
BUDGETS = {
    "topk.stream_kernel": (96, 96),
    "topk.refine_kernel": (64, 96),
    "topk.count_kernel": (80, 64),
    "topk.emit_kernel": (128, 96),
    "topk.scatter_kernel": (48, 32),
    "sign.compress_kernel": (96, 64),
    "sign.decompress_kernel": (64, 48),
    "chunk_topk.compress_kernel": (120, 80),
    "chunk_topk.decompress_kernel": (88, 56),
}
# Older versions count histograms by warp votes and keep more of a reduction in registers.
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    BUDGETS |= {
        "topk.stream_kernel": (128, 128),
        "topk.refine_kernel": (80, 96),
        "sign.compress_kernel": (128, 64),
    }
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
WIDE = ["topk.stream_kernel[fp32]", "topk.stream_kernel[bf16]", "sign.compress_kernel[fp32, 256]"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, str(root / "tests/kernels/aot.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def figures(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (variant, target, found)
        for variant, targets in report["variants"].items()
        for target, found in targets.items()
        if "error" not in found
    ]


def test_every_kernel_is_compiled(report: dict[str, Any]) -> None:
    compiled = {variant.partition("[")[0] for variant in report["variants"]}
    assert set(report["kernels"]) == compiled, "a kernel has no signature in aot.py"
    assert compiled == set(BUDGETS), "a kernel has no budget"


def test_for_every_target(report: dict[str, Any]) -> None:
    assert all(set(targets) == TARGETS for targets in report["variants"].values())
    failed = [
        f"{variant} for {target}:\n{found['error']}"
        for variant, targets in report["variants"].items()
        for target, found in targets.items()
        if "error" in found
    ]
    assert not failed, f"Triton {triton.__version__} compiles these not:\n" + "\n".join(failed)


def test_registers_and_spills(report: dict[str, Any]) -> None:
    over = []
    for variant, target, found in figures(report):
        budget = BUDGETS[variant.partition("[")[0]][target.startswith("gfx")]
        if found["registers"] > budget or found["spills"]:
            over.append(
                f"{variant} for {target}: {found['registers']} registers of {budget}, "
                f"{found['spills']} spilled"
            )
    assert not over, "\n".join(over)


def test_aligned_tensors_move_16_bytes_at_a_time(report: dict[str, Any]) -> None:
    narrow = [
        f"{variant} for {target}: {found['wide_loads']} wide loads, {found['wide_stores']} wide stores"
        for variant, target, found in figures(report)
        if variant in WIDE
        and target.startswith("sm")
        # A thread has 16 elements of a whole tile: 4 loads of err, 4 of fp32 grad or 2 of bf16, 4 stores.
        and (found["wide_loads"] < 6 + 2 * ("fp32" in variant) or found["wide_stores"] < 4)
    ]
    assert set(WIDE) <= set(report["variants"])
    assert not narrow, "\n".join(narrow)


def test_nothing_is_contracted_flushed_or_approximate(report: dict[str, Any]) -> None:
    inexact = [
        f"{variant} for {target}: {', '.join(found['inexact'])}"
        for variant, target, found in figures(report)
        if found.get("inexact")
    ]
    assert not inexact, "\n".join(inexact)
