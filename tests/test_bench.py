"""The benchmark suite and the GPU check work; no test here looks at how long anything took."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_topk_lists, charts, codec_speed, gpu_check, inputs, suite
from tests.cases import same_bytes

ROOT = Path(__file__).resolve().parent.parent


# Runs the suite as where pytest-benchmark is not installed, and with a peer that computes something else.
BROKEN_PEER_WITHOUT_PLUGIN = """
import importlib.metadata, importlib.util, runpy, sys
distributions, find_spec = importlib.metadata.distributions, importlib.util.find_spec
importlib.metadata.distributions = lambda **options: (
    d for d in distributions(**options) if d.name != "pytest-benchmark")
importlib.util.find_spec = lambda name, *rest: (
    None if name == "pytest_benchmark" else find_spec(name, *rest))
from bench import peers
select = peers.torch_topk
peers.torch_topk = lambda magnitude, k: select(magnitude, k) + 1
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


# One worker runs the suite, once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("bench")]

# A topic is a file of the suite.
TOPICS = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("bench")
    return python("-m", "bench", "--quick", "--out", out), out


@pytest.fixture(scope="module")
def report(run: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    done, out = run
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return report


def test_writes_table_json_and_chart(report: dict[str, Any], run: Any) -> None:
    done, out = run
    for word in (
        "topk_ef_",
        "sign_ef_",
        "chunk_topk_ef_",
        "quantize_ef_",
        "random_k_ef_",
        "torch composition",
        "torch + packbits",
        "x fp32 floor",
        "x Gaussian",
    ):
        assert word in done.stdout
    charts = {path.name for path in out.glob("*.png")}
    assert {chart.removeprefix("bench-").partition("-")[0].partition(".")[0] for chart in charts} == TOPICS
    assert len(charts) == len(TOPICS)  # a quick run has one size of each
    assert all((out / chart).read_bytes().startswith(b"\x89PNG") for chart in charts)
    assert report["failed"] == []
    assert report["quick"] is True


def test_machine_is_described(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert machine["device"] == "cpu"
    assert machine["threads"] >= 1
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["instruction_set"] in ("avx512", "avx2", "neon", "portable")
    assert machine["cpu_model"]


def test_numbers_follow_from_samples(report: dict[str, Any]) -> None:
    ours = {(r["kernel"], r["grad_dtype"]) for r in report["records"] if r["implementation"] == "gck"}
    kernels = ("topk_ef_", "sign_ef_", "chunk_topk_ef_", "quantize_ef_", "random_k_ef_")
    assert ours >= {(kernel, dtype) for kernel in kernels for dtype in ("fp32", "bf16")}
    assert ours >= {("decompress", "fp32"), ("decompress_add_", "fp32")}
    assert {r["topic"] for r in report["records"]} == TOPICS
    for record in report["records"]:
        assert record["seconds"] == statistics.median(record["samples"])
        assert record["floor_seconds"] == statistics.median(record["floor_samples"])
        assert record["multiple_of_floor"] == record["seconds"] / record["floor_seconds"]
        assert record["multiple_of_fp32_floor"] == record["seconds"] / record["floor_fp32_seconds"]
        assert len(record["samples"]) == len(record["floor_samples"]) == record["rounds"] == 3
        assert (record["floor_samples"] == record["floor_fp32_samples"]) == (record["grad_dtype"] == "fp32")


def test_peers_are_verified_and_compared(report: dict[str, Any]) -> None:
    for ours in (r for r in report["records"] if r["implementation"] == "gck"):
        same = ("topic", "kernel", "n", "grad_dtype", "setting")
        others = [r for r in report["records"] if r is not ours and all(r[key] == ours[key] for key in same)]
        assert bool(others) == (ours["topic"] != "topk_inputs")
        assert all(r["verified_against_gck"] is True for r in others)
        assert ours["times_faster_than"] == {
            r["implementation"]: r["seconds"] / ours["seconds"] for r in others
        }


def test_floors_of_their_own(report: dict[str, Any]) -> None:
    """Of decoding 8 payloads of 1 %: 8 bytes an entry, and out written once, or read and written."""
    for kernel, nbytes in (("decompress", 8 * 8 * 0.01 + 4), ("decompress_add_", 8 * 8 * 0.01 + 8)):
        records = [r for r in report["records"] if r["kernel"] == kernel and r["setting"] == "8 of 1%"]
        assert {r["implementation"] for r in records} >= {"gck", "torch index_add_"}
        for record in records:
            least = record["floor_fp32_seconds"] * nbytes / 12
            assert record["multiple_of_own_floor"] == pytest.approx(record["seconds"] / least)


def test_inputs_are_compared_with_the_common_one(report: dict[str, Any]) -> None:
    records = {r["setting"]: r for r in report["records"] if r["topic"] == "topk_inputs"}
    assert len(records) > 2
    for record in records.values():
        common = records[inputs.GAUSSIAN]["seconds"]
        assert record["times_common_input"] == record["seconds"] / common


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_inputs_are_what_was_asked_for(name: str) -> None:
    for n in (1, 513, 70_001):
        grad, err = inputs.make(name, n)
        assert grad.shape == err.shape == (n,)
        assert grad.dtype == err.dtype == torch.float32
        again = inputs.make(name, n)
        assert all(same_bytes(a, b) for a, b in zip((grad, err), again, strict=True))


def test_rounds_of_slow_peers_are_few() -> None:
    plan = suite.Plan(torch.device("cpu"))
    ours = suite.Case("kernel", "option", 1, 1_000_000, torch.float32, suite.GCK, id)
    peer = dataclasses.replace(ours, implementation="peer", verify=id)
    assert suite.rounds_of(ours, plan, 0.1) == plan.rounds(ours.n) == suite.rounds_of(peer, plan, 1e-4)
    for seconds in (0.01, 0.1, suite.SLOW_SECONDS):
        assert suite.SLOW_ROUNDS < suite.rounds_of(peer, plan, seconds) <= suite.PEER_SECONDS / seconds
    assert suite.rounds_of(peer, plan, 1.0) == suite.rounds_of(ours, plan, 1.0) == suite.SLOW_ROUNDS
    assert suite.rounds_of(peer, suite.Plan(plan.device, quick=True), 1.0) == 3


def test_charts_have_a_color_for_every_peer() -> None:
    names = [suite.GCK, *map(str, range(20))]
    assert set(charts._colors([{"implementation": name} for name in names])) == set(names)


def test_parameters_of_gpt2() -> None:
    sizes = bench_topk_lists.gpt2_sizes()
    assert (len(sizes), sum(sizes)) == (148, 124_439_808)


def test_wrong_peer_is_not_timed_and_pytest_benchmark_is_optional(tmp_path: Path) -> None:
    done = python("-c", BROKEN_PEER_WITHOUT_PLUGIN, "--quick", "--only", "topk", "--out", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torch.topk and gck disagree (n=100000, k=1000)" in done.stdout
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["failed"]) == 1
    assert "torch.topk alone" in report["failed"][0]
    assert {r["implementation"] for r in report["records"]} == {
        "gck",
        "gck, warm hint",
        "torch composition",
    }
    assert not (tmp_path / "pytest-benchmark.json").exists()


@pytest.mark.parametrize("wrong", [("--only", "nothing"), ("--only", "sign", "-k", "nothing")])
def test_unknown_names_are_refused(wrong: tuple[str, ...], tmp_path: Path) -> None:
    done = python("-m", "bench", "--quick", *wrong, "--out", tmp_path)
    assert done.returncode == 2
    assert "'nothing'" in done.stderr


def test_speed_of_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(speed > 0 for speed in codec_speed.speeds("elias_fano", 10_000, 100, turns=2))
    monkeypatch.setattr(
        codec_speed.index_codecs, "decode_", lambda codec, rows, numel, out, function: out.zero_()
    )
    with pytest.raises(RuntimeError, match="block16: what was decoded is not what was encoded"):
        codec_speed.speeds("block16", 10_000, 100, turns=2)


def test_a_report_can_be_shown_again(report: dict[str, Any], run: Any, tmp_path: Path) -> None:
    done = python("-m", "bench", "--again", run[1] / "bench.json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report | {"schema": 1}))
    refused = python("-m", "bench", "--again", old, "--out", tmp_path / "none")
    assert refused.returncode == 2
    assert "schema 1 is not 2" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = python("-m", "bench.gpu_check", "--out", tmp_path)
    assert done.returncode == 2
    assert "gpu-check: no GPU: torch" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpu_check_counts_tests(tmp_path: Path) -> None:
    results = tmp_path / "tests.xml"
    results.write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">'
        '<testcase classname="a" name="good"/><testcase classname="a" name="also"/>'
        '<testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="b" name="broken"><error/></testcase>'
        '<testcase classname="b" name="not here"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu_check.counts(results) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failed_tests": ["a::bad", "b::broken"],
    }
    assert gpu_check.counts(tmp_path / "missing.xml")["passed"] == 0
