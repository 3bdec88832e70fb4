"""The benchmark of simulated worlds, on small ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import scale


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark computes with one thread a rank, which waits long for its turn; others here shall not."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    yield
    torch.set_num_threads(before[0])
    sys.setswitchinterval(before[1])


def test_a_small_world(tmp_path: Path) -> None:
    scale.main(numel=4096, steps=2, largest=8, out=tmp_path)
    records = {r["name"]: r for r in json.loads((tmp_path / "scale.json").read_text())["records"]}
    assert set(records) == set(scale.COMPRESSORS)
    assert (tmp_path / "scale.png").stat().st_size > 1000
    for record in records.values():
        assert record["same_bits"]
        assert record["nbytes"] == record["predicted_nbytes"] > 0
        assert record["error_of_sum"] <= record["error_of_first"] < 1
    assert records["dense fp32"]["error_of_first"] < 1e-6 < records["sign"]["error_of_first"]


def test_what_would_not_fit_is_left_out() -> None:
    assert scale.held("8 bits", 1024, 1 << 20) > scale.MEMORY > scale.held("8 bits", 1024, 1 << 18)
