"""What `make count-arm64` runs under its emulator, on this machine; and what it makes of what was counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.arm64.__main__ import by_name
from bench.arm64.calls import NUMEL, compressors

ROOT = Path(__file__).parents[1]


def test_every_call_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.arm64.calls"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = json.loads(done.stdout)
    assert len(names) == len(set(names))
    assert {*compressors(), "err.add_(grad)", "sign, 256: reduce of 8"} <= set(names)
    assert sum("reduce of" in name for name in names) == 11


def test_counts_are_of_an_element() -> None:
    numbers = 1000, 1000 + 3 * NUMEL, 5, 5 + NUMEL // 2
    lines = ["qemu: a warning", *(f"counted {i} {number}" for i, number in enumerate(numbers))]
    printed = "".join(f"{line}\n" for line in lines)
    assert by_name(["one", "other"], printed) == {"one": 3.0, "other": 0.5}


def test_a_count_that_is_missing_is_an_error() -> None:
    with pytest.raises(KeyError):
        by_name(["one"], "counted 0 1000\n")
