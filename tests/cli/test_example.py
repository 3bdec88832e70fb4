import os
import re
import subprocess
import sys
from pathlib import Path

import gck


def test_example_learns() -> None:
    root = Path(gck.__file__).parents[1]
    script = Path(__file__).parents[2] / "examples" / "train_ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2
    for rank in range(2):
        assert f"rank {rank}: saved and loaded 2 residuals" in done.stdout
