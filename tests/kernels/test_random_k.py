"""What is particular to random-k: its indices, that it is unbiased, and where what is not finite goes."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.errors import ArgumentError, DtypeError
from gck.kernels.random_k import RandomK, Unbiased, cpu, reference
from tests.cases import CASES, GRAD_DTYPES, make, one_nan, same_bytes
from tests.contract import check_case

SEEDS = st.integers(-(2**63), 2**63 - 1)
RISK = 1e-9  # that a statistical test fails although all is well, had its seeds been drawn at random


def kernels_of(backend: str) -> Any:
    if backend == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module(f"gck.kernels.random_k.{'cpu' if backend == 'cpu' else 'gpu'}")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_is_that_of_the_paper(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers that the authors publish with Random123."""
    assert reference.philox(counter, key) == words


class TestIndices:
    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), n=st.one_of(st.integers(1, 40), st.integers(1, 3000)), seed=SEEDS)
    def test_k_different_ones_ascend(self, data: st.DataObject, n: int, seed: int) -> None:
        k = data.draw(st.one_of(st.integers(1, n), st.just(n), st.just(1)))
        indices = cpu.indices(seed, n, k).tolist()
        assert len(indices) == k
        assert 0 <= indices[0] <= indices[-1] < n
        assert all(a < b for a, b in pairwise(indices))
        assert indices == reference.indices(seed, n, k)
        if k == n:
            assert indices == list(range(n))

    @settings(max_examples=100, deadline=None)
    @given(n=st.integers(2**32, 2**61), k=st.integers(1, 300), seed=SEEDS)
    def test_of_vectors_that_fit_nowhere(self, n: int, k: int, seed: int) -> None:
        """Against Python's integers, which do not overflow."""
        wanted = reference.indices(seed, n, k)
        assert cpu.indices(seed, n, k).tolist() == wanted
        first = k // 2
        assert cpu.indices(seed, n, k, first, k - first).tolist() == wanted[first:]

    @pytest.mark.parametrize(("n", "k"), [(2**40, 2**33 + 1), (2**61 - 1, 2**60 + 5), (2**40 + 7, 2**40 + 6)])
    def test_of_very_many(self, n: int, k: int) -> None:
        """Any of them is had by itself: the entry of the stratum whose turn it is."""
        seed, (size, longer) = 11, divmod(n, k)
        rotation = reference.number(seed, 2**64 - 2) * n >> 64

        def stratum(element: int) -> int:
            position = (element - rotation) % n
            i = min(position // size, k - 1)
            while i * size + min(i, longer) > position:
                i -= max(1, (i * size + min(i, longer) - position) // (size + 1))
            offset = reference.number(seed, i) * (size + (i < longer)) >> 64
            assert i * size + min(i, longer) + offset == position
            return i

        for first in (0, 1, k // 3, k - 100):
            some = cpu.indices(seed, n, k, first, 100).tolist()
            assert all(a < b for a, b in pairwise(some))
            start = stratum(cpu.indices(seed, n, k, 0, 1).item())
            assert [stratum(x) for x in some] == [(start + first + i) % k for i in range(100)]
            assert start == 0 or stratum(cpu.indices(seed, n, k, k - 1, 1).item()) == start - 1

    def test_the_seed_decides_and_torch_has_no_part(self) -> None:
        torch.manual_seed(1)
        grad, err = make("gaussian", 5000, torch.float32)
        before = torch.get_rng_state()
        payloads = [gck.random_k_ef_(grad, err.clone(), 0.1, seed=seed) for seed in (3, 3, 4)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(payloads[0].values, payloads[1].values)
        assert not torch.equal(payloads[0].values, payloads[2].values)
        assert cpu.indices(3, 5000, 500).tolist() != cpu.indices(4, 5000, 500).tolist()


def furthest(counts: Tensor, trials: int, k: int) -> float:
    """How far the most striking of n counts is from its mean, 1 being as far as `RISK` allows.

    A count of T independent events of probability p = k / n is further than d from T p with a probability of
    at most 2 exp(-d**2 / (2 (T p (1 - p) + d / 3))) (Bernstein). That is RISK / n where, with L = ln(2 n /
    RISK), d = L / 3 + sqrt(L**2 / 9 + 2 T p (1 - p) L).
    """
    n = counts.numel()
    p, log = k / n, math.log(2 * n / RISK)
    bound = log / 3 + math.sqrt(log**2 / 9 + 2 * trials * p * (1 - p) * log)
    return float((counts - trials * p).abs().max()) / bound


@pytest.mark.parametrize(("n", "k"), [(11, 4), (13, 1), (30, 8), (97, 90)])
def test_each_index_is_equally_likely(n: int, k: int) -> None:
    trials = 20_000
    counts = torch.zeros(n, dtype=torch.float64)
    for seed in range(trials):
        counts[cpu.indices(seed, n, k)] += 1
    assert counts.sum() == trials * k
    assert furthest(counts, trials, k) < 1


def test_without_the_rotation_they_would_not_be() -> None:
    """Strata of different sizes: that the test above can tell."""
    n, k, trials = 11, 4, 20_000
    counts = torch.zeros(n, dtype=torch.float64)
    for seed in range(trials):
        counts[torch.tensor(reference.ring(seed, n, k)[1])] += 1
    assert furthest(counts, trials, k) > 1


def test_without_error_feedback_it_is_unbiased() -> None:
    """The mean of T decoded messages, each entry of which is 0 or x * n / k.

    By Hoeffding, the mean is further from x than |x| * (n / k) * sqrt(ln(2 / p) / (2 T)) with a probability
    of at most p; with p = RISK / n, no entry of n is. The factor and the product are each rounded once:
    2**-23 relative, together.
    """
    n, k, trials = 512, 128, 4000
    x = make("gaussian", n, torch.float32)[0]
    total = torch.zeros(n, dtype=torch.float64)
    for seed in range(trials):
        total += gck.decompress(gck.random_k(x, k=k, seed=seed))
    bound = (n / k) * math.sqrt(math.log(2 * n / RISK) / (2 * trials)) + 2.0**-23
    assert ((total / trials - x).abs() / x.abs()).max() < bound
    assert bound < 0.5  # unscaled, the mean would be x / 4


def test_what_is_left_out_is_as_much_as_the_paper_says() -> None:
    """E ||x - C(x)||**2 = (1 - k / n) ||x||**2 (Stich et al., 2018, Lemma A.1), over T seeds by Hoeffding."""
    n, k, trials = 1000, 130, 2000
    x = make("gaussian", n, torch.float32)[0]
    left = 0.0
    for seed in range(trials):
        err = torch.zeros(n)
        gck.random_k_ef_(x, err, k=k, seed=seed)
        left += float(err.double().square().sum() / x.double().square().sum())
    assert abs(left / trials - (1 - k / n)) < math.sqrt(math.log(2 / RISK) / (2 * trials))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_stratum_alone(bad: float) -> None:
    n, k, seed = 23, 4, 3
    rotation, chosen = reference.ring(seed, n, k)
    order = sorted(range(k), key=lambda i: (chosen[i] + rotation) % n)
    bounds = [i * (n // k) + min(i, n % k) for i in range(k + 1)]
    for x in range(n):
        stratum = next(i for i in range(k) if bounds[i] <= (x - rotation) % n < bounds[i + 1])
        err, nonfinite = torch.arange(n) + 1.0, torch.zeros(1, dtype=torch.int64)
        err[x] = bad
        payload = gck.random_k_ef_(torch.zeros(n), err, k=k, seed=seed, nonfinite=nonfinite)
        own = (chosen[stratum] + rotation) % n == x
        spoilt = [order.index(stratum)]
        assert (~payload.values.isfinite()).nonzero().flatten().tolist() == spoilt
        assert same_bytes(payload.values[spoilt], torch.tensor([bad if own else math.nan]))
        assert int(nonfinite) == (1 if own else 2)
        assert err.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3, 40])
def test_strata_that_threads_share(k: int) -> None:
    """What is not finite lies with one thread, and its stratum's entry with another."""
    n, threads = 300_007, torch.get_num_threads()
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for seed in range(4):
                grad, err = make("gaussian", n, torch.float32)
                grad[[n // 7 * seed, n // 2, n - 1 - seed]] = math.nan
                check_case(RandomK(k=k, seed=seed), "cpu", grad, err)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 1500),
    seed=SEEDS,
    case=st.sampled_from(list(CASES)),
    dtype=st.sampled_from(GRAD_DTYPES),
    value_dtype=st.sampled_from(GRAD_DTYPES),
    kind=st.sampled_from([RandomK, Unbiased]),
)
def test_any_configuration(
    data: st.DataObject,
    n: int,
    seed: int,
    case: str,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    kind: type[RandomK],
) -> None:
    k = data.draw(st.integers(1, n))
    check_case(kind(k=k, seed=seed, value_dtype=value_dtype), "cpu", *make(case, n, dtype))


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
def test_the_sum_of_bodies_is_that_of_one_after_the_other(
    value_dtype: torch.dtype, accumulate: bool, backend: str
) -> None:
    n, ranks = 9001, 3
    compressor = RandomK(ratio=0.3, seed=77, value_dtype=value_dtype)
    layout = compressor.layout(n)
    memory = torch.zeros(ranks, layout.nbytes + 48, dtype=torch.uint8)
    bodies = memory[:, : layout.nbytes]
    for rank in range(ranks):
        grad, err = make("few nonfinite" if rank == 1 else "gaussian", n, torch.float32)
        compressor.compress_(grad + rank, err, bodies[rank : rank + 1])
    base = torch.linspace(-1, 1, n)
    got, wanted = base.clone(), base.clone() if accumulate else torch.zeros(n)
    kernels_of(backend).decompress_sum_(compressor, got, bodies, layout, 0.3, accumulate)
    for body in bodies:
        wanted += torch.tensor(0.3) * reference.decompress(compressor, layout.views(body), n)
    assert same_bytes(one_nan(got), one_nan(wanted))


def test_without_a_residual_it_is_unbiased() -> None:
    """Through the compressor as through the function, into one and the same bytes."""
    x = make("gaussian", 1000, torch.float32)[0]
    compressor = RandomK(k=300, seed=8)
    body = torch.zeros(1, compressor.layout(1000).nbytes, dtype=torch.uint8)
    compressor.compress_(x, None, body)
    (values,) = compressor.layout(1000).views(body[0])
    assert same_bytes(values, gck.random_k(x, k=300, seed=8).values)
    assert same_bytes(values, x[cpu.indices(8, 1000, 300)] * torch.tensor(1000 / 300, dtype=torch.float32))


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ArgumentError, "exactly one of ratio and k must be given, got ratio=None and k=None"),
    ({"ratio": 0.1, "k": 3}, ArgumentError, "exactly one of ratio and k must be given"),
    ({"ratio": 0.0}, ArgumentError, r"ratio must be in \(0, 1\], got 0.0"),
    ({"k": 0}, ArgumentError, "k must be at least 1, got 0"),
    ({"k": 2.0}, DtypeError, r"k must be an int, got 2.0 \(float\)"),
    ({"k": 2, "seed": "1"}, DtypeError, r"seed must be an int, got '1' \(str\)"),
    ({"k": 2, "seed": True}, DtypeError, r"seed must be an int, got True \(bool\)"),
    (
        {"k": 2, "seed": -(2**63) - 1},
        ArgumentError,
        r"seed must be in \[-2\*\*63, 2\*\*63\), got -9223372036",
    ),
    ({"k": 2, "value_dtype": torch.float64}, DtypeError, "value_dtype must be float32, bfloat16 or float16"),
]


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS, ids=str)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^RandomK: .*{text}"):
        RandomK(**options)


def test_too_many_for_the_vector() -> None:
    err = torch.ones(10)
    body = torch.zeros(1, 48, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="k must be at most the number of elements 10, got 11"):
        RandomK(k=11, seed=0).compress_(torch.ones(10), err, body)
    assert torch.equal(err, torch.ones(10))


def test_compressors_of_different_seeds_are_different() -> None:
    assert RandomK(k=3, seed=1) == replace(RandomK(k=3), seed=1) != RandomK(k=3, seed=2)
