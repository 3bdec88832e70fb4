"""Every snippet of the README is executed here, and what its commands call by the test named beside each.

The recipes behind `make` install into .venv, which a test must not: CI runs them, and the tests run what
they call.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gck
from gck.compressor import compressor_of_step

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# command -> the test that runs what it calls.
ELSEWHERE = {
    "make demo": "tests/cli",
    "make test": "this run",
    "make bench": "tests/test_bench.py",
    "make bench-link": "tests/test_bench_link.py",
    "make gpu-check": "tests/test_bench.py",
    "pip install .": "tests/test_packaging.py",
    'pip install ".[cuda13]"': "extras: test_extras",
    "pip install --no-build-isolation --no-deps .": "tests/test_packaging.py",
    "gck doctor": "tests/cli",
    "gck demo": "tests/cli",
    "gck plan --numel 124M --world-size 8 --rate 1gbit --latency-ms 0.5 --backward-ms 600": "tests/cli",
    "torchrun --standalone --nproc-per-node=2 examples/train_ddp.py": "tests/cli/test_example.py",
    "torchrun --standalone --nproc-per-node=4 examples/train_fsdp.py": "tests/cli/test_example.py",
    "torchrun --standalone --nproc-per-node=4 examples/train_local_steps.py": "tests/cli/test_example.py",
    "python examples/federated.py": "tests/cli/test_example.py",
}


def test_commands_are_known() -> None:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line]
    assert commands
    assert not [command for command in commands if command not in ELSEWHERE]
    targets = [command.removeprefix("make ") for command in commands if command.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_extras() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for cuda in ("12", "13"):
        names = {re.split(r"[>=]", requirement)[0] for requirement in extras[f"cuda{cuda}"]}
        assert names == {"triton", f"cupy-cuda{cuda}x", f"nvidia-nccl-cu{cuda}"}


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) == 5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        scope = {"net": torch.nn.Linear(4, 4), "world_size": 1, "rank": 0}
        for snippet in snippets:
            exec(snippet, scope)
            if "nbytes" in snippet:
                assert scope["payload"].nbytes == 80000
    finally:
        dist.destroy_process_group()
    assert len(scope["one_each"]) == 2
    assert scope["sparse_loco"].layout(2**30).nbytes * 8 / 2**30 == pytest.approx(0.23, abs=0.005)
    assert len(scope["payloads"]) == 1
    assert torch.load(tmp_path / "checkpoint-0.pt")["gck"]["rank"] == 0


def test_which_compressor() -> None:
    """Bits, what one step leaves of a Gaussian gradient, and how many payloads an all-reduce sends."""
    rows = re.findall(r"^\| `(gck\.\w+\(.*?\))` \| ([\d.]+) \| ([\d.]+) \| (.*?) \|", README, re.MULTILINE)
    assert len(rows) == 9
    grad = torch.randn(2**20, generator=torch.Generator().manual_seed(1))
    for text, bits, left, times in rows:
        compressor, numel = compressor_of_step(eval(text, {"gck": gck}), 3, 0), 25_000_000
        nbytes = compressor.layout(numel).nbytes
        assert float(bits) == pytest.approx(8 * nbytes / numel, abs=0.0051), text
        err = torch.zeros_like(grad)
        body = torch.zeros(1, compressor.layout(grad.numel()).nbytes, dtype=torch.uint8)
        compressor.compress_(grad, err, body)
        assert float(left) == pytest.approx(float(err.square().sum() / grad.square().sum()), abs=0.0051), text
        for world_size in (2, 3, 16, 64):
            others = world_size - 1
            most = {"about 2": 2, "W - 1, at most 5": min(others, 5), "W - 1": others}[times] * nbytes
            sent = gck.collectives.all_reduce_cost(compressor, [numel], world_size).nbytes
            assert sent <= 1.001 * most, (text, world_size)
            assert world_size < 64 or sent > 0.95 * most, text


def test_the_ten_line_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = blocks("python")[0]
    exec(snippet, {})
    said = re.search(r"print\(.*\)\s+# (.*)", snippet)
    assert said is not None
    assert capsys.readouterr().out.strip() == said.group(1)
