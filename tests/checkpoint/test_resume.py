"""Kill and resume: training that was killed twenty times ends with the bits of one that never was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gck

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    """Real processes on gloo, by SIGKILL; see `killed_training`. No model of the crash is assumed here: what
    is on the disk is what the kernel was left with."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "output").open("wb") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.killed_training", str(tmp_path), "1"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = run.wait(240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # its forks are of its group
        run.wait()
    assert code == 0, (tmp_path / "output").read_text()[-4000:]
    log = json.loads((tmp_path / "log.json").read_text())
    steps, kills = log["steps"], log["kills"]
    assert len(kills) == 20
    assert kills[-1]["complete"][-1] < steps, "a killed attempt came to the end"
    for rank in (0, 1):
        whole, killed, forgetful = (
            json.loads((tmp_path / name / f"{rank}.json").read_text())
            for name in ("whole", "killed", "forgetful")
        )
        assert whole["step"] == killed["step"] == steps
        assert killed["digest"] == whole["digest"]
        assert forgetful["digest"] != whole["digest"]
    # What is left: two complete sets, for the rank that was first one file more, nothing that was cut short.
    assert gck.saved_steps(tmp_path / "killed") == [steps - 1, steps]
    left = sorted(path.name for path in (tmp_path / "killed").glob("*gck-*"))
    assert len(left) <= 5
    assert not [name for name in left if name.endswith(".tmp")]
