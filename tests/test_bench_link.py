"""The benchmark of slow links, on bare loopback and small; and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench.link import __main__ as command
from bench.link.methods import BASELINE, METHODS, matrix_shape
from bench.link.report import record_of
from gck.cli.links import Node
from gck.cli.network import Network
from tests.versions import needs_init_sync


@needs_init_sync
def test_on_loopback(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.main)
    options = ["--workers", "2", "--rate", "loopback", "--numel", "4096", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "link.json").read_text())["records"]
    assert [record["method"] for record in records] == list(METHODS)
    for record in records:
        assert record["seconds"] > 0
        assert len(record["all_seconds"]) == 15
        # Headers of packets and the barriers come on top; a loopback interface counts both.
        assert record["wire_bytes"] > record["nbytes"] / 2
    assert (tmp_path / "link.png").stat().st_size > 1000


def test_records() -> None:
    network = Network([Node(0, "x", "10.77.0.1", 10**8)], "100mbit", None)
    event = {
        "method": BASELINE,
        "numel": 1000,
        "seconds": [3.0, 1.0, 2.0],
        "wire_bytes": 7.0,
        "compute": 0.5,
    }
    record = record_of(event, 4, network, 0.25, burst=1000)
    assert record["burst"] == 1000
    assert record["nbytes"] == 6000  # of 4,000 three quarters, twice
    assert record["seconds"] == 2.0
    assert record["ideal_seconds"] == pytest.approx(6000 / (10**8 / 8 * 1448 / 1514))
    assert record["predicted"] == {
        "pieces": 1,
        "latency": 1.5,  # a ring of four, twice
        "bytes": pytest.approx(6000 / (10**8 / 8 * 1448 / 1547)),
        "compute": 0.5,
        "at_once": pytest.approx(1000 / (10**8 / 8 * 1448 / 1547)),
        "seconds": pytest.approx(2.0 + 5000 / (10**8 / 8 * 1448 / 1547)),
    }
    # What the bytes of 4 ms are, and no more than there are.
    assert record_of(event, 4, network, 0.25)["predicted"]["seconds"] == pytest.approx(2.0)
    assert record_of(event, 4, network, 0.25)["burst"] == 50_000
    assert record["algbw"] == 2000.0
    assert record["busbw"] == 3000.0


@pytest.mark.parametrize("numel", [1, 7, 4096, 25_000_000])
def test_matrix_shape(numel: int) -> None:
    rows, columns = matrix_shape(numel)
    assert rows * columns == numel
    assert rows <= columns


def test_unknown_methods_are_named() -> None:
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--method", "carrier pigeons"])
    assert result.exit_code == 1
    assert "carrier pigeons" in str(result.exception)
