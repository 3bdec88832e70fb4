"""Every Triton kernel compiles for every target, in its register budget, without a GPU.

All of its variants do for one, and for the others where GCK_AHEAD_OF_TIME=all, as by `make test-targets`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.aot_budgets import (  # noqa: E402  # which needs Triton
    BUDGETS,
    INSTRUCTIONS,
    LONE,
    LONE_WARPS,
    MORE_INSTRUCTIONS,
    RARE,
    SPILLED,
    STREAMS,
    WIDE,
)

ALL = os.environ.get("GCK_AHEAD_OF_TIME") == "all"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if ALL else 900)]

TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return compiled()
    # Workers of one run share a folder. The first one compiles, on both processors; others wait for it.
    shared = tmp_path_factory.getbasetemp().parent / "ahead_of_time.json"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            shared.write_text(json.dumps(compiled()))
    made: dict[str, Any] = json.loads(shared.read_text())
    return made


def compiled() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, str(root / "tests/kernels/aot.py"), *(["--all"] if ALL else [])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def spills_allowed(variant: str, target: str) -> int:
    for variants, targets, words in SPILLED:
        if re.fullmatch(variants, variant) and re.fullmatch(targets, target):
            return words
    return 0


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


def test_sizes_that_32_bits_cannot_count(report: dict[str, Any]) -> None:
    """Every kernel that is told how long the vector is; tables of lists are 64 bits wide anyway."""
    past = {variant.partition("[")[0] for variant in report["variants"] if "past 2^31" in variant}
    assert past == set(report["sized"])
    assert len(past) > 15


def test_for_every_target(report: dict[str, Any]) -> None:
    of_kernel: dict[str, set[str]] = {}
    for variant, targets in report["variants"].items():
        assert "sm_90" in targets
        assert not ALL or set(targets) == TARGETS
        of_kernel.setdefault(variant.partition("[")[0], set()).update(targets)
    assert all(targets == TARGETS for targets in of_kernel.values())
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
        lone = variant.replace(", past 2^31", "") in LONE_WARPS
        budgets = LONE if lone else BUDGETS[variant.partition("[")[0]]
        budget = max(budgets[target.startswith("gfx")], RARE.get(variant, 0))
        if found["registers"] > budget or found["spills"] > spills_allowed(variant, target):
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
        and (found["wide_loads"] < WIDE[variant][0] or found["wide_stores"] < WIDE[variant][1])
    ]
    assert set(WIDE) <= set(report["variants"])
    assert not narrow, "\n".join(narrow)


def test_the_stream_moves_each_element_once(
    report: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    """Counted in the machine code of the kernel of whole tiles; printed for the documentation to quote."""
    for variant, size in STREAMS.items():
        for target, found in sorted(report["variants"][variant].items()):
            if target.startswith("gfx"):
                continue
            line = (
                f"{variant} for {target}: {found['registers']} registers, "
                f"{found['instructions_an_element']} instructions an element, "
                f"{found['bytes_read_an_element']:g} bytes read and "
                f"{found['bytes_written_an_element']:g} written an element"
            )
            print(line)
            record_property(f"{variant} {target}", line)
            assert found["instructions_an_element"] <= INSTRUCTIONS, line
            assert found["bytes_read_an_element"] == size + 4, line
            assert found["bytes_written_an_element"] == 4, line
            # A value and an index each, under a predicate: 6 bytes a survivor, and 4 in the bracket.
            assert found["list_stores_an_element"] == 3, line


def test_what_options_and_any_address_cost_the_stream(report: dict[str, Any]) -> None:
    over = [
        f"{variant} for {target}: {found['instructions_an_element']} instructions an element of {most}"
        for variant, most in MORE_INSTRUCTIONS.items()
        for target, found in report["variants"][variant].items()
        if target.startswith("sm") and found["instructions_an_element"] > most
    ]
    assert not over, "\n".join(over)


def test_nothing_is_contracted_flushed_or_approximate(report: dict[str, Any]) -> None:
    inexact = [
        f"{variant} for {target}: {', '.join(found['inexact'])}"
        for variant, target, found in figures(report)
        if found.get("inexact")
    ]
    assert not inexact, "\n".join(inexact)
