"""docs/frameworks.md: its snippets train on two ranks, with residuals and parameters as they should be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gck

ROOT = Path(gck.__file__).parents[1]
SAID = """
import os
import torch.distributed as dist
found = torch.cat([parameter.detach().view(-1) for parameter in net.parameters()])
left = {name: float(each.worker.norm()) for name, each in state.residuals.items()}
said = f"rank {dist.get_rank()}: step {state.step}, {found.double().sum().item():.12f}, {left}"
os.write(1, f"\\n{said}\\n".encode())  # at once: the other rank writes, too
"""
FITS = {
    "accelerate": SAID,
    "pytorch_lightning": "net, state = trainer.model.net, compression.state" + SAID,
}


def snippet(library: str) -> str:
    (found,) = (
        text
        for text in re.findall(r"```python\n(.*?)```", (ROOT / "docs/frameworks.md").read_text(), re.DOTALL)
        if re.search(rf"^(import|from) {library}\b", text, re.MULTILINE)
    )
    return found


def train(library: str, directory: Path, changed: tuple[str, str] = ("", "")) -> dict[int, str]:
    """What each rank says in the end."""
    code = snippet(library)
    assert changed[0] in code
    script = directory / "train.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + code.replace(*changed) + FITS[library])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return {int(rank): said for rank, said in re.findall(r"rank (\d): (.*)", done.stdout)}


def apart(said: dict[int, str]) -> tuple[int, str]:
    """(step, sum of the parameters), the same on both ranks, whose residuals differ."""
    parts = [re.fullmatch(r"step (\d+), (\S+), (\{.*\})", said[rank]) for rank in range(2)]
    assert all(parts)
    (steps, sums, residuals) = zip(*(part.groups() for part in parts if part), strict=True)
    assert steps[0] == steps[1]
    assert sums[0] == sums[1]
    assert residuals[0] != residuals[1]
    assert re.findall(r"\w*\.?([02].weight)", residuals[0]) == ["0.weight", "2.weight"]
    return int(steps[0]), sums[0]


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    # 128 rows, 8 a batch, on 2 ranks, 2 batches a step
    step, _ = apart(train("accelerate", tmp_path))
    assert step == 4
    assert gck.saved_steps(tmp_path / "run") == [4]
    assert (tmp_path / "run/model-4").is_dir()
    again, _ = apart(train("accelerate", tmp_path))
    assert again == 8


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    callbacks = "callbacks=[compression"
    every_epoch = callbacks, f"{callbacks}, pl.callbacks.ModelCheckpoint(save_top_k=-1)"
    step, parameters = apart(train("pytorch_lightning", tmp_path, every_epoch))
    assert step == 12
    assert gck.saved_steps(tmp_path / "residuals") == [4, 8, 12]
    # From the checkpoint after one epoch on, in another fit after that: the same bits.
    (checkpoint,) = tmp_path.rglob("*step=4.ckpt")
    (call,) = re.findall(r"trainer.fit.*\n", snippet("pytorch_lightning"))
    resumed = f"""\
trainer.fit_loop.max_epochs = 2
trainer.fit(Model(), loader, ckpt_path={str(checkpoint)!r})
trainer.fit_loop.max_epochs = 3
trainer.fit(trainer.lightning_module, loader)
"""
    assert apart(train("pytorch_lightning", tmp_path, (call, resumed))) == (step, parameters)
