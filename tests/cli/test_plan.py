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
from gck.cli.plan import estimate as module
from gck.cli.plan.compressors import CANDIDATES, parse
from gck.cli.plan.estimate import GATHERED, Plan, estimate, make_plan
from gck.cli.plan.report import advice
from gck.cli.plan.settings import Settings, parse_numel
from gck.collectives import all_reduce_cost
from gck.compressor import Compressor, compressor_of_step
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
    """But for the one whose bytes depend on the shapes of a model, which the README says."""
    rows = re.findall(r"^\| `gck\.(\w+\(.*?\))` \| ", README, re.MULTILINE)
    assert rows == [*CANDIDATES, "LowRank(rank=4)"]


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
    """There it takes as long as 16 bits, on any faster link longer; in pieces or at once, as it is sent."""
    found = 0
    for row in measured.compressed:
        below = measured.pays_below(row)
        if below is None or below == float("inf"):
            continue
        found += 1
        for factor, sooner in ((0.99, True), (1.01, False), (1.5, False), (10, False)):
            link = USUAL.link(below * factor)
            half = measured.half.cost.seconds(link)
            assert (row.seconds_over(link, USUAL) <= half) is sooner, (row.name, factor)
    assert found
    same = estimate("TopK(k=10**6)", gck.TopK(k=10**6), USUAL, 0.0, 0.5)
    assert same.cost.algorithm == "dense"
    assert same.left == 0
    assert measured.pays_below(same) is None
    assert measured.pays_below(replace(measured.half, compressor=None)) == float("inf")


@pytest.mark.parametrize(
    ("rate", "backward", "compute", "said"),
    [
        (
            "100mbit",
            None,
            1e-3,
            r"^All-reduces .* first: Quantize\(bits=8\) 1.9 times, leaves 0.00; .* 0.92\. The",
        ),
        ("100mbit", 0.6, 1e-3, "^Do not compress: a backward pass of 600 ms can hide"),
        ("100mbit", 0.25, 1e-3, "^16 bits are enough, .*: steps 2.0 times faster than with dense fp32, and"),
        ("100mbit", 0.26, 1e-3, "^16 bits are enough"),
        (
            "100mbit",
            0.14,
            1e-3,
            r"^Quantize\(bits=8\): steps 1.8 times faster .* leaves 0.00",
        ),
        ("100mbit", 0.03, 1e-3, r"^Sign\(\): .*Milder, and slower: Quantize\(bits=2.*; Quantize\(bits=8\)"),
        (
            "1mbit",
            0.03,
            1e-3,
            r"^Steps .* first: Quantize\(bits=8\) .* 0.9\d\. The backward pass does not hide it: ",
        ),
        (
            "100gbit",
            None,
            1e-2,
            "^Do not compress: of 3.51 ms dense gradients wait 3 ms for 6 messages one .* short\\.$",
        ),
        ("5gbit", None, 1e-2, "^16 bits are enough.* all-reduces 1.6 times"),
        (
            "20gbit",
            0.001,
            1e-2,
            "^16 bits are enough.* The backward pass does not hide it.* is latency, of 6",
        ),
        ("1gbit", None, 0.1, "^16 bits are enough"),
    ],
)
def test_advice(measured: Plan, rate: str, backward: float | None, compute: float, said: str) -> None:
    bits = Settings.parse("1M", 4, rate, 0.5, None, "cpu").bits_per_second
    plan = with_times(measured, replace(USUAL, bits_per_second=bits, backward=backward), compute)
    assert re.search(said, advice(plan)), advice(plan)


def test_what_is_as_good_as_the_fastest_is_the_mildest(measured: Plan) -> None:
    """Not what leaves most for a step that is a little shorter; and none that is beaten in both."""
    plan = with_times(measured, replace(USUAL, backward=0.02), 1e-3)
    front = plan.frontier()
    assert [row.left for row in front] == sorted(row.left for row in front)
    steps = [plan.step(row) for row in front]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] < plan.step(plan.half)
    for row in plan.compressed:
        beaten = any(
            plan.step(o) <= plan.step(row) and o.left <= row.left for o in plan.compressed if o is not row
        )
        assert (row in front) is not beaten, row.name
    chosen = next(row for row in front if plan.step(row) <= 1.1 * steps[-1])
    assert advice(plan).startswith(f"{chosen.name}: ")
    assert chosen.name == "Sign()"
    assert plan.step(front[-1]) < plan.step(chosen)


def test_steps_hide_behind_a_backward_pass(measured: Plan) -> None:
    """But what compresses on the same processors does not."""
    plan = with_times(measured, replace(USUAL, backward=0.14), 1e-3)
    by_name = {row.name: row for row in plan.rows}
    assert plan.speed_up(by_name["Sign()"]) == pytest.approx(plan.dense.seconds / 0.141)
    assert plan.step(plan.half) == plan.half.seconds


def test_an_absolute_k_is_of_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def measure(compressor: Compressor, numel: int, *_: object, **__: object) -> float:
        timed.append((numel, compressor.layout(numel).nbytes))
        return numel * 1e-9

    monkeypatch.setattr(module, "measure_compute", measure)
    settings = Settings.parse("100M", 8, "1gbit", 0.5, None, "cpu")
    plan = make_plan(settings, ["TopK(k=1000000)", "TopK(ratio=0.01)"])
    absolute, relative = plan.compressed
    assert absolute.cost == relative.cost
    assert absolute.left == pytest.approx(relative.left, abs=1e-3)
    assert timed[0] == timed[1]
    assert absolute.compute == relative.compute == pytest.approx(0.1)
    with pytest.raises(ArgumentError, match="k must be at most the number of elements 100000000, got"):
        make_plan(settings, ["TopK(k=200000000)"])


def test_gradients_that_are_elsewhere() -> None:
    settings = Settings.parse("1M", 4, "100mbit", 0.5, None, "none")
    assert all(row.compute == 0 for row in make_plan(settings, CANDIDATES).compressed)


def test_table() -> None:
    done = run("--rate", "100mbit", "--compressor", "gck.TopK(ratio=0.5)")
    assert done.exit_code == 0, done.output
    for text in ("200,000 elements, 4 ranks, 100 Mbit/s, 0.5 ms", "dense 16 bits", "Sign()", "no slower"):
        assert text in done.output
    assert "gck.TopK(ratio=0.5):" in done.output
    assert "sends dense" in done.output


@pytest.mark.parametrize("numel", ["3000", "200k", "124M", "10G"])
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_tables_are_whole(numel: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off, down to 80 columns, which narrower terminals wrap."""
    monkeypatch.setenv("COLUMNS", columns)
    done = run("--rate", "1gbit", "--numel", numel, "--device", "none", "--backward-ms", "100")
    lines = done.output.splitlines()
    assert done.exit_code == 0, done.output
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.output
    assert all(len(line.rstrip()) <= max(80, int(columns)) for line in lines)
    rows = [line for line in lines if re.search(r" \d\.\d\d +\d.*? k?M?G?B ", line)]
    assert len(rows) == 10
    for row in rows[2:]:
        assert re.search(r" x +(\d+(\.\d)? [GMk]b/s|always|never)$", row.rstrip()), row
    assert any(re.search(r"reduce +faster +below$", line.rstrip()) for line in lines)


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
    assert all(row["pays_below"] is None for row in report["rows"][:2])
    assert all(row["pays_always"] or row["pays_below"] > 1e6 for row in report["rows"][2:])
    assert any(row["frontier"] for row in report["rows"][2:])
    assert report["advice"]


@pytest.mark.parametrize("text", ["TopK(ratio=0.0001)", "TopK(k=1000000)"])
def test_worlds_that_are_large_are_measured_in_little_memory(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gather of 1,024 payloads of 25M elements would take 5 GB."""
    gathered = []

    def measure(compressor: Compressor, numel: int, world_size: int, *_: object, **__: object) -> float:
        gathered.append(compressor.layout(numel).nbytes * world_size)
        return numel * 1e-9

    monkeypatch.setattr(module, "measure_compute", measure)
    plan = make_plan(Settings.parse("10G", 1024, "100mbit", 0.5, None, "cpu"), [text])
    assert plan.compressed[0].cost.algorithm == "one_phase"
    assert plan.compressed[0].compute == pytest.approx(10.0)
    assert 0 < gathered[0] <= 1.01 * GATHERED


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--rate", "1gbit", "--device", "none", "--out", str(tmp_path / "file/folder"))
    assert done.exit_code == 1
    assert "gck plan: --out: " in " ".join(done.stderr.split())
    assert not done.stdout


def test_names_are_no_markup() -> None:
    done = run("--rate", "1gbit", "--device", "none", "--compressor", "Sign() # [/]")
    assert done.exit_code == 0, done.output
    assert "[/]" in done.output


@pytest.mark.parametrize(
    ("text", "numel"),
    [
        ("1", 1),
        ("124439808", 124439808),
        ("124M", 124 * 10**6),
        ("1.001B", 1001 * 10**6),
        ("25e6", 25 * 10**6),
    ],
)
def test_numel(text: str, numel: int) -> None:
    assert parse_numel(text) == numel


@pytest.mark.parametrize("text", ["1gbit", "1gbps", "1 Gbit/s", "1Gb/s", "1000mbps", "1 gbits/s"])
def test_rates(text: str) -> None:
    assert Settings.parse("1", 2, text, 0, None, "cpu").bits_per_second == 10**9


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e99", "nan", "M", "12 apples", "2e13", "1m"])
def test_numel_that_is_none(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"124M, 7B or 25e6, got {text!r}")):
        parse_numel(text)


@pytest.mark.parametrize("text", [*CANDIDATES, "LowRank(rank=4, columns=768)"])
def test_compressors_are_python(text: str) -> None:
    """A seed that is another one at every step is that of one of them."""
    assert parse(text) == compressor_of_step(eval(f"gck.{text}", {"gck": gck, "step": 1}), 1, 0)
    assert parse("RandomK(ratio=0.01, seed=step)") == parse("RandomK(ratio=0.01)")
    assert parse(f" gck.{text} ") == parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TopK", "of ChunkTopK, LowRank, Quantize, RandomK, Sign, TopK"),
        ("PowerSGD(4)", "of ChunkTopK"),
        ("LowRank(rank=4)", "how long the rows of its matrices are"),
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
        ((), "Missing option '--rate'"),
        (("--rate", "fast"), "--rate must be bits a second, like 100mbit, 1gbit or 2.5gbps, got 'fast'"),
        (("--rate", "1GB/s"), "--rate must be bits a second, like 100mbit, 1gbit or 2.5gbps, got '1GB/s'"),
        (("--rate", "1GBps"), "--rate must be bits a second"),
        (("--rate", "9" * 400 + "bit"), "--rate must be bits a second"),
        (("--rate", "1 0 mbit"), "--rate must be bits a second"),
        (("--rate", "\u0661gbit"), "--rate must be bits a second"),
        (("--rate", "1gbit", "--numel", "\u0661M"), "--numel must be like"),
        (("--rate", "1gbit", "--world-size", "1"), "--world-size must be in [2, 1024], got 1"),
        (("--rate", "1gbit", "--latency-ms", "nan"), "--latency-ms must be at least 0 and finite, got nan"),
        (("--rate", "1gbit", "--backward-ms", "-1"), "--backward-ms must be at least 0 and finite, got -1"),
        (("--rate", "1gbit", "--device", "tpu"), "--device must be one of cpu, cuda, none, got 'tpu'"),
        (("--rate", "1gbit", "--numel", "0"), "--numel must be like"),
        (("--rate", "1gbit", "--compressor", "None"), "--compressor must be like"),
    ],
)
def test_wrong_options(options: tuple[str, ...], said: str) -> None:
    done = run(*options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not done.stdout
