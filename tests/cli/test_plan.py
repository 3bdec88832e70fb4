"""What `gck plan` predicts and advises, and what it says to wrong options."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gck
from gck.cli import app
from gck.cli.plan.compressors import CANDIDATES, parse
from gck.cli.plan.estimate import Plan, estimate, make_plan
from gck.cli.plan.report import advice, to_dict
from gck.cli.plan.settings import Settings, parse_numel
from gck.collectives import all_reduce_cost
from gck.errors import ArgumentError

README = (Path(__file__).parents[2] / "README.md").read_text()
USUAL = Settings.parse("1M", 4, "100mbit", 0.5, None, "cpu")


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["plan", "--numel", "200k", "--world-size", "4", *options])


@pytest.fixture(scope="module")
def measured() -> Plan:
    return make_plan(USUAL, CANDIDATES)


def with_times(plan: Plan, settings: Settings, compute: float) -> Plan:
    """The same question over another link, of a machine that takes `compute` seconds for every compressor."""
    rows = [estimate(r.name, parse(r.name), settings, compute, r.left) for r in plan.compressed]
    dense = replace(plan.dense, seconds=plan.dense.cost.seconds(settings.link()))
    half = replace(plan.half, seconds=plan.half.cost.seconds(settings.link()))
    return Plan(settings, dense, half, rows)


def test_the_candidates_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| `gck\.(\w+\(.*?\))` \| ", README, re.MULTILINE)
    assert rows == list(CANDIDATES)


def test_rows_are_the_cost_models(measured: Plan) -> None:
    assert measured.dense.cost.nbytes == 2 * measured.half.cost.nbytes
    for row in measured.compressed:
        assert row.compute > 0
        assert row.cost == all_reduce_cost(parse(row.name), [USUAL.numel], USUAL.world_size)
        assert row.seconds == row.cost.seconds(USUAL.link(), row.compute, row.pieces)
        assert row.seconds == row.seconds_over(USUAL.link(), USUAL)
    in_pieces = {row.name for row in measured.compressed if row.pieces > 1}
    assert "Quantize(bits=8)" in in_pieces
    assert not any(name.startswith(("TopK", "RandomK")) for name in in_pieces)


def test_pays_below(measured: Plan) -> None:
    """There both take equally long, if all goes at once."""
    found = 0
    for row in measured.compressed:
        below = row.pays_below(measured.dense.cost, USUAL.latency)
        if below is None or below == float("inf"):
            continue
        found += 1
        for factor, sooner in ((0.99, True), (1.01, False)):
            link = USUAL.link(below * factor)
            assert (row.cost.seconds(link, row.compute) < measured.dense.cost.seconds(link)) is sooner
    assert found
    same = estimate("TopK(k=10**6)", gck.TopK(k=10**6), USUAL, 0.0, 0.0)
    assert same.cost.algorithm == "dense"
    assert same.pays_below(measured.dense.cost, USUAL.latency) is None
    assert measured.half.pays_below(measured.dense.cost, USUAL.latency) == float("inf")


@pytest.mark.parametrize(
    ("rate", "backward", "compute", "said"),
    [
        ("100mbit", None, 1e-3, "Leaves least behind: Quantize(bits=8), "),
        ("100mbit", 0.6, 1e-3, "Do not compress: a backward pass of 600 ms can hide"),
        ("100mbit", 0.3, 1e-3, "16 bits are enough"),
        ("100mbit", 0.14, 1e-3, "Quantize(bits=8): of those that the backward pass can hide"),
        ("100mbit", 0.03, 1e-3, "Sign(): of those that the backward pass can hide"),
        ("1mbit", 0.03, 1e-3, "None hides behind the backward pass"),
        ("100gbit", None, 1e-2, "Do not compress: dense gradients take"),
        ("100gbit", 0.001, 1e-2, "Do not compress: dense gradients take"),
        ("1gbit", None, 0.1, "Do not compress: dense gradients take"),
    ],
)
def test_advice(measured: Plan, rate: str, backward: float | None, compute: float, said: str) -> None:
    bits = Settings.parse("1M", 4, rate, 0.5, None, "cpu").bits_per_second
    plan = with_times(measured, replace(USUAL, bits_per_second=bits, backward=backward), compute)
    assert said in advice(plan)


def test_steps_hide_behind_a_backward_pass(measured: Plan) -> None:
    plan = with_times(measured, replace(USUAL, backward=0.14), 1e-3)
    by_name = {row.name: row for row in plan.rows}
    assert plan.speed_up(by_name["Sign()"]) == pytest.approx(plan.dense.seconds / 0.14)
    assert plan.step(plan.half) == plan.half.seconds


def test_table() -> None:
    done = run("--rate", "100mbit", "--compressor", "gck.TopK(ratio=0.5)")
    assert done.exit_code == 0, done.output
    for text in ("200,000 elements, 4 ranks, 100 Mbit/s, 0.5 ms", "dense 16 bits", "Sign()", "no slower"):
        assert text in done.output
    assert "gck.TopK(ratio=0.5):" in done.output
    assert "sends dense" in done.output
    assert all(len(line) <= 80 for line in done.output.splitlines())


def test_files_and_json(tmp_path: Path) -> None:
    done = run("--rate", "1gbit", "--backward-ms", "2", "--json", "--out", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "new/plan.json").read_text())
    assert (tmp_path / "new/plan.png").read_bytes().startswith(b"\x89PNG")
    assert report["settings"] == {
        "numel": 200_000,
        "world_size": 4,
        "bits_per_second": 10**9,
        "latency": 0.0005,
        "backward": 0.002,
        "device": "cpu",
    }
    assert [row["name"] for row in report["rows"]] == ["dense fp32", "dense 16 bits", *CANDIDATES]
    assert report["rows"][0]["cost"]["nbytes"] == 200_000 * 4 * 2 * 3 // 4
    assert report["rows"][0]["pays_below"] is None
    assert report["rows"][1]["pays_always"] is True
    assert report["advice"]


def test_worlds_that_are_large_are_measured_in_little_memory() -> None:
    """A gather of 1,024 payloads of 25M elements would take 5 GB."""
    settings = Settings.parse("2G", 1024, "100mbit", 0.5, None, "cpu")
    plan = make_plan(settings, ["TopK(ratio=0.0001)"])
    assert plan.compressed[0].cost.algorithm == "one_phase"
    assert to_dict(plan)["rows"][2]["compute"] > 0


@pytest.mark.parametrize(
    ("text", "numel"),
    [("1", 1), ("124439808", 124439808), ("124M", 124 * 10**6), ("1.5B", 15 * 10**8), ("25e6", 25 * 10**6)],
)
def test_numel(text: str, numel: int) -> None:
    assert parse_numel(text) == numel


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e99", "nan", "M", "12 apples", "2e13", "1m"])
def test_numel_that_is_none(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"124M, 7B or 25e6, got {text!r}")):
        parse_numel(text)


@pytest.mark.parametrize("text", CANDIDATES)
def test_compressors_are_python(text: str) -> None:
    assert parse(text) == eval(f"gck.{text}", {"gck": gck, "step": 1})
    assert parse(f" gck.{text} ") == parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TopK", "of ChunkTopK, Quantize, RandomK, Sign, TopK"),
        ("LowRank(4)", "of ChunkTopK"),
        ("TopK(ratio=__import__('os').getpid())", "with plain values"),
        ("TopK(ratio=0.1", "with plain values"),
        ("TopK(*[0.1])", "with plain values"),
        ("TopK(**{'ratio': 0.1})", "unexpected keyword"),
        ("(" * 5000, "with plain values"),
        ("TopK(ratio=2)", "ratio must be in (0, 1], got 2"),
        ("TopK(rate=2)", "unexpected keyword argument 'rate'"),
        ("Sign(chunk_size='x')", "chunk_size"),
    ],
)
def test_compressors_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("--compressor ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rate", "fast"), "rate must be like 100mbit"),
        (("--rate", "1gbit", "--world-size", "1"), "--world-size must be in [2, 1024], got 1"),
        (("--rate", "1gbit", "--latency-ms", "nan"), "--latency-ms must be at least 0 and finite, got nan"),
        (("--rate", "1gbit", "--backward-ms", "-1"), "--backward-ms must be at least 0 and finite, got -1"),
        (("--rate", "1gbit", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--rate", "1gbit", "--numel", "0"), "--numel must be like"),
        (("--rate", "1gbit", "--compressor", "None"), "--compressor must be like"),
    ],
)
def test_wrong_options(options: tuple[str, ...], said: str) -> None:
    done = run(*options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not done.stdout
