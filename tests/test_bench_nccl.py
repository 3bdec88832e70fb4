"""The benchmark of NCCL over the fake library, and what it does with a wrong result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench.nccl import __main__ as command
from bench.nccl.report import record_of, size_text
from bench.nccl.tasks import CHUNK, TASKS, Dense, Packed, Sparse, WrongResultError
from gck.collectives import SimulatedGroup, packed_all_reduce_
from tests.nccl.library import fake_library

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would use the GPU, and the fake library cannot")
def test_over_the_fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCK_NCCL_LIBRARY", str(fake_library()))
    app = typer.Typer()
    app.command()(command.main)
    sizes = ["--size", "1024", "--size", "2097152"]
    result = CliRunner().invoke(app, ["--quick", *sizes, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "nccl.json").read_text())
    assert report["times_are_artefacts"] == "host memory, no NCCL"
    assert report["absent"] == dict.fromkeys(
        ("torch.distributed", "cupy.cuda.nccl"), "there is no CUDA device"
    )
    for words in ("times are artefacts", "torch.distributed is absent, because: there is no CUDA device"):
        assert words in " ".join(result.output.split())
    found = [(record["task"], record["method"], record["nbytes"]) for record in report["records"]]
    methods = [
        ("sparse all-gather", "gck"),
        ("sparse all-gather", "gck, without a wait"),
        ("packed all-reduce", "gck"),
        ("all-reduce", "gck"),
    ]
    assert sorted(found) == sorted((*method, size) for method in methods for size in (1024, 2097152))
    assert all(len(record["all_seconds"]) == 5 and record["seconds"] > 0 for record in report["records"])
    assert (tmp_path / "nccl.png").stat().st_size > 1000


def test_no_gpu_and_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCK_NCCL_LIBRARY", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--quick", "--out", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no GPU; GCK_NCCL_LIBRARY may name a library" in result.output
    assert not (tmp_path / "none").exists()


def sparse_result(task: Sparse, world_size: int) -> list[Any]:
    return [task.expected(rank, CPU) for rank in range(world_size)]


def test_a_wrong_byte_is_found() -> None:
    """In any part of any result, also where only a residual is wrong."""
    sparse = Sparse(0, 3, 3000, CPU)
    sparse.verify(sparse_result(sparse, 3))
    for field in (0, 1):
        wrong = sparse_result(sparse, 3)
        wrong[2][field][-1] += 1
        with pytest.raises(
            WrongResultError, match=r"sparse all-gather: (values|indices) of rank 2 are wrong"
        ):
            sparse.verify(wrong)
    with pytest.raises(WrongResultError, match="2 payloads of 3 ranks"):
        sparse.verify(sparse_result(sparse, 2))

    dense = Dense(1, 2, 4000, CPU)
    total = dense.source + Dense(0, 2, 4000, CPU).source
    dense.verify(total)
    total[-1] *= -1
    with pytest.raises(WrongResultError, match="the sum is wrong"):
        dense.verify(total)


@pytest.mark.parametrize("numel", [1, 5 * CHUNK + 3, 100 * CHUNK + 70])
def test_packed_results_are_verified(numel: int) -> None:
    def rank_main(member: Any) -> None:
        task = Packed(member.rank, 2, 4 * numel, CPU)
        for _ in range(2):
            task.reset()
            packed_all_reduce_(task.grad, task.err, task.server_err, CHUNK, member)
            task.verify(task.grad)
        buffers = {"result": task.grad, "residual": task.err}
        if member.rank * task.shard < numel:
            buffers["server residual"] = task.server_err
        for name, buffer in buffers.items():
            kept = buffer.clone()
            buffer[0] += 0.5
            with pytest.raises(WrongResultError, match=f"the {name} is wrong"):
                task.verify(task.grad)
            buffer.copy_(kept)

    SimulatedGroup(2, timeout=60).run(rank_main)


def test_records() -> None:
    event = {"task": "t", "method": "m", "nbytes": 4000, "seconds": [2.0, 1.0, 4.0], "calls": 3}
    for task, factor in (("sparse all-gather", 0.75), ("packed all-reduce", 1.5), ("all-reduce", 1.5)):
        record = record_of(event | {"busbw_factor": TASKS[task].busbw(4)}, 4)
        assert (record["algbw"], record["busbw"]) == (2000.0, 2000.0 * factor)
    assert [size_text(n) for n in (12, 1 << 10, 3 << 19, 256 << 20)] == ["12 B", "1 KB", "1.5 MB", "256 MB"]
