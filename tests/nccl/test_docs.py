"""The program in docs/nccl.md runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.nccl.library import ROOT, fake_library


def test_the_program(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(import .*?)```", (ROOT / "docs/nccl.md").read_text(), re.DOTALL)
    path = tmp_path / "program.py"
    path.write_text(program)
    variables = os.environ | {"GCK_NCCL_LIBRARY": str(fake_library()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], env=variables, capture_output=True, text=True, timeout=90)
    # Of two processes on one pipe: lines may be mixed.
    assert sorted(re.findall(r"rank \d: 0\.5", done.stdout)) == ["rank 0: 0.5", "rank 1: 0.5"], done.stderr
    assert done.returncode == 0
