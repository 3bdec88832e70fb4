"""Every instruction set gives the same bytes, not only the best one that this machine has."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gck
from gck._native import load
from gck.kernels.topk import reference
from tests.cases import make, same_bytes
from tests.contract import check_case

ROOT = Path(__file__).parents[2]


def available() -> list[str]:
    if platform.machine() in ("aarch64", "arm64"):
        return ["neon", "portable"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [name for name, flag in (("avx512", "avx512bw"), ("avx2", "avx2")) if flag in flags.split()]
    return [*has, "portable"]


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"GCK_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", available())
def test_contract(isa: str) -> None:
    chosen = (
        "test_cpu and float32 and (nonfinite or ties) or test_halves or test_64 or (test_shards and cpu)"
        " or one_by_one or hostile or random_bits or laid_out_for_more or (test_ranks and 17)"
        " or golden or any_number_of_threads or (test_bytes and gaussian and 65537)"
        " or small_vectors or past_the_caches or every_chunk_size or any_shape or orthonormal or bases"
    )
    reduce = "tests/kernels/test_reduce.py"
    codecs = "tests/kernels/test_index_codecs.py"
    preview = "tests/kernels/test_topk_preview.py"
    low_rank = "tests/kernels/test_low_rank.py"
    files = "tests/test_contract.py", "tests/kernels/test_cpu_sparse.py", reduce, codecs, preview, low_rank
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files, __file__)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("case", ["gaussian", "ties", "nonfinite"])
@pytest.mark.parametrize("chunk_size", [2**i for i in range(5, 14)])
def test_every_chunk_size(chunk_size: int, case: str) -> None:
    """Some have code of their own. Chunks enough for all that are under way at a time, in two rows, with a
    last one that is cut short; alone, too, and with few others."""
    compressors = (
        gck.Sign(chunk_size),
        gck.Quantize(8, chunk_size),
        gck.Quantize(2, chunk_size, scale="mean"),
    )
    for compressor in compressors:
        for n in (chunk_size - 5, chunk_size, 2 * chunk_size + 1, 9 * chunk_size + 17):
            check_case(compressor, "cpu", *make(case, n, torch.float32), shards=2)


@pytest.mark.parametrize("case", ["gaussian", "ties", "nonfinite", "denormal", "all equal", "sorted"])
@pytest.mark.parametrize("n", [15, 129, 1000, 2500, 9000, 65_535])
def test_small_vectors(n: int, case: str) -> None:
    """Thresholds by comparing all with all, by halving intervals of keys, and by bins."""
    for k in sorted({1, n // 100 or 1, n // 31 or 1, n // 10, n // 5, n // 3, n // 2, n - 1, n}):
        grad, err = make(case, n, torch.float32)
        (values, indices), residual, _ = reference.compress(gck.TopK(k=k), grad, err)
        hint = torch.zeros(1, dtype=torch.int32)
        payload = gck.topk_ef_(grad, err, k=k, hint=hint)
        assert same_bytes(payload.values, values)
        assert torch.equal(payload.indices, indices)
        assert same_bytes(err, residual)
        assert k == n or int(hint) == int((values.view(torch.int32) & 0x7FFFFFFF).min())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cuts", [(), (7, 1_250_010)], ids=["one", "three"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_payloads_past_the_caches(threads: int, cuts: tuple[int, ...], value_dtype: torch.dtype) -> None:
    """Lines of a payload of fp32 values are shared by parts and by the pieces that lists have. Candidates
    fill many stretches, with some to mend in each, of narrow values, too: the guess is of a sample."""
    n, k, before = 2_500_001, 1_060_007, torch.get_num_threads()
    grad, err = make("gaussian", n, torch.float32)
    compressor = gck.TopK(k=k, value_dtype=value_dtype)
    (values, indices), residual, _ = reference.compress(compressor, grad, err)
    ends = (*cuts, n)
    grads, errs = ([x[a:b] for a, b in zip((0, *cuts), ends, strict=True)] for x in (grad, err))
    torch.set_num_threads(threads)
    try:
        given = (grads, errs) if cuts else (grad, err)
        payload = gck.topk_ef_(*given, k=k, flat=bool(cuts), value_dtype=value_dtype)
    finally:
        torch.set_num_threads(before)
    assert same_bytes(payload.values, values)
    assert torch.equal(payload.indices, indices)
    assert same_bytes(err, residual)


@pytest.mark.parametrize("isa", available())
def test_the_set_that_was_asked_for_runs(isa: str) -> None:
    assert run(isa, "-c", "from gck._native import load; print(load().isa())").stdout.strip() == isa


def test_the_best_set_is_chosen() -> None:
    assert run("", "-c", "from gck._native import load; print(load().isa())").stdout.strip() == available()[0]


def test_an_unknown_set_is_an_error() -> None:
    done = run("sse9", "-c", "import torch, gck; gck.topk(torch.ones(4), k=1)")
    assert done.returncode != 0
    sets = "neon or portable" if "neon" in available() else "avx512, avx2 or portable"
    text = f"GCK_ISA must be {sets}, got sse9. Unset this environment variable"
    assert f"BackendUnavailableError: gck._C: {text}" in done.stderr
    seen = json.loads(run("sse9", "-m", "gck", "doctor", "--json").stdout)
    assert not seen["cpu_path_works"]
    assert [text in f["detail"] for f in seen["findings"] if f["name"] == "CPU kernels"] == [True]


@pytest.mark.parametrize("n", [1000, 100_003], ids=["small", "sampled"])
def test_64_bit_indices(n: int) -> None:
    """As vectors of more than 2**31 - 1 elements have them, without the memory."""
    grad, err = make("ties", n, torch.float32)
    (values, indices), residual, _ = reference.compress(gck.TopK(k=77), grad, err)
    got_values, got = torch.full((77,), torch.nan), torch.full((77,), -1, dtype=torch.int64)
    addresses = grad.data_ptr(), 0, err.data_ptr(), n, 77, got_values.data_ptr(), 0, got.data_ptr()
    load().topk_compress(*addresses, True, 0, 2, None)
    assert torch.equal(got, indices.long())
    assert same_bytes(got_values, values)
    assert same_bytes(err, residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_widened_exactly(dtype: torch.dtype) -> None:
    grad = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    payload = gck.topk(grad, ratio=1.0)
    assert same_bytes(payload.values, reference.compress(gck.TopK(ratio=1.0), grad, torch.tensor(-0.0))[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    # Every value, every midpoint between neighbours, and one step to either side of those.
    ordered = every.unique()
    middle = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
    points = torch.cat([ordered, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    points = torch.cat(
        [points, torch.tensor([65504.0, 65519.9, 65520.0, 3.4e38, float("inf"), float("nan")])]
    )
    payload = gck.topk(points, ratio=1.0, value_dtype=dtype)
    wanted = torch.where(points.isnan(), float("nan"), points.to(dtype))
    assert same_bytes(payload.values, wanted)
    assert load().isa() in available()
