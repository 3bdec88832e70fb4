import os
import re
import subprocess
import sys
from pathlib import Path

import gck
from tests.versions import needs_fsdp_hook


def run(script: str, ranks: int, *options: str) -> str:
    """Of one rank by python alone, of more by torchrun."""
    root, command = Path(gck.__file__).parents[1], [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(Path(__file__).parents[2] / "examples" / script), *options],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_learns_and_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = run("train_ddp.py", 2, str(directory))
    losses = re.findall(r"step (\d+): loss (\d+\.\d+)", first)
    assert [int(step) for step, _ in losses] == [40, 80, 120, 160, 200]
    assert float(losses[-1][1]) < float(losses[0][1]) / 2
    assert gck.saved_steps(directory) == [160, 200]
    # As if rank 1 had been killed before it saved the last step.
    (directory / "gck-000000000200-rank-00001-of-00002.safetensors").unlink()
    again = run("train_ddp.py", 2, str(directory))
    for rank in range(2):
        assert f"rank {rank}: goes on from step 160 with 2 residuals" in again
    # The same step with the same bits before it.
    assert re.findall(r"step (\d+): loss (\d+\.\d+)", again) == losses[-1:]


@needs_fsdp_hook
def test_sharded_example_learns() -> None:
    said = run("train_fsdp.py", 4)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+)", said)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 5
    assert re.search(r"120 steps; residuals of this rank's shards of ([02].weight(, )?){2}\n", said)


def test_local_steps_learn_and_go_on(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = run("train_local_steps.py", 3, str(directory))
    losses = [float(loss) for loss in re.findall(r"round \d+: loss (\d+\.\d+)", first)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    ends = re.findall(r"rank \d: (parameters -?\d+; sent \d+ bytes)", first)
    assert len(ends) == 3
    assert len(set(ends)) == 1  # the same parameters on all ranks
    assert ends[0].endswith("sent 1216 bytes")  # two payloads of 2 bits an entry
    # As if rank 1 had been killed before it saved the last round.
    (directory / "gck-000000000020-rank-00001-of-00003.safetensors").unlink()
    again = run("train_local_steps.py", 3, str(directory))
    assert again.count("goes on from round 15") == 3
    assert re.findall(r"rank \d: (parameters -?\d+; sent \d+ bytes)", again) == ends


def test_federated_example_learns() -> None:
    said = run("federated.py", 1)
    losses = [float(loss) for loss in re.findall(r"round \d+: loss (\d+\.\d+)", said)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    assert re.search(r"sent \d+,\d+,\d+ bytes, 4\.\d times less than fp32", said)
