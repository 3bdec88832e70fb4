"""Arrays of other libraries through a communicator: NumPy's over the fake library, CuPy's over the real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gck.collectives import SimulatedGroup
from tests.collectives import launcher, scenarios
from tests.nccl.array_calls import CALLS, NUMEL, compressed, digest, packed
from tests.nccl.library import ROOT
from tests.nccl.ranks import run_ranks

numpy = pytest.importorskip("numpy")


def with_numpy(group: Any) -> dict[str, str]:
    """What each call leaves behind, by its name."""
    return {
        call.__name__: digest(*call(numpy, group, scenarios.gradient(group.rank, NUMEL).numpy()))
        for call in CALLS
    }


@pytest.mark.usefixtures("fake")
def test_arrays_of_numpy() -> None:
    assert run_ranks(2, with_numpy) == SimulatedGroup(2, timeout=60).run(with_numpy)


@pytest.mark.gpu
@pytest.mark.xdist_group("nccl")
class TestCuPy:
    @pytest.fixture(autouse=True)
    def no_fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("cupy")
        if "fake_nccl" in os.environ.get("GCK_NCCL_LIBRARY", ""):
            monkeypatch.delenv("GCK_NCCL_LIBRARY")

    def test_its_current_stream_is_honoured(self, tmp_path: Path) -> None:
        """Two ranks. Results are right though the gradient is written late, on that stream alone; and no
        call that need not waits for the device."""
        reports = launcher.run_ranks("tests.nccl.cupy_worker", 2, tmp_path, timeout=200)
        for rank, expected in enumerate(SimulatedGroup(2, timeout=60).run(with_numpy)):
            for call in CALLS:
                found = reports[rank][call.__name__]
                assert found["first"] == expected[call.__name__], call.__name__
                assert found["again"] == expected[call.__name__], call.__name__
                # The others commit, and wait for that.
                assert found["busy"] or call in (compressed, packed), call.__name__

    def test_the_example(self) -> None:
        done = subprocess.run(
            [sys.executable, "examples/cupy_nccl.py"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        first, *_, last = (
            float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "rank 0" in line
        )
        assert last < first / 10, done.stdout
