"""What is particular to quantize: random bits, rounding, levels, and what error feedback conserves."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.quantize import Quantize, reference
from gck.wire import Layout
from tests.cases import CASES, make, one_nan, same_bytes
from tests.contract import check_case
from tests.kernels.bits import bit_patterns
from tests.kernels.launches import recorded

STOCHASTIC = Quantize(4, 64, "stochastic", seed=-5)


def compressed(compressor: Quantize, grad: Tensor, err: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """(fields, decoded) of the CPU kernel; err becomes the residual."""
    n = grad.numel()
    body = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
    compressor.compress_(grad, err, body)
    dense = torch.full((n,), math.nan)
    compressor.decompress_(dense, body[0])
    return compressor.layout(n).views(body[0]), dense


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
    assert reference.philox([torch.tensor(c) for c in counter], *key).tolist() == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1 << 32])
@pytest.mark.parametrize("chunk_size", [32, 256])
def test_seeds(seed: int, chunk_size: int) -> None:
    compressor = Quantize(8, chunk_size, "stochastic", seed)
    check_case(compressor, "cpu", *make("gaussian", 5000, torch.float32))


def test_the_seed_decides_and_torch_has_no_part() -> None:
    grad, err = make("gaussian", 5000, torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    bodies = [compressed(replace(STOCHASTIC, seed=seed), grad, err.clone())[0][0] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(bodies[0], bodies[1])
    assert not torch.equal(bodies[0], bodies[2])


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of T independent roundings, each within one step of the element.

    A rounding lies in two neighbouring codes, so that its variance is at most step**2 / 4, and (Hoeffding)
    the mean of T is further than step * sqrt(ln(2 / p) / (2 * T)) from its expectation with probability p at
    most. With p = 1e-9 / n, no element of n is, but once in 1e9 seeds. The expectation is the element to
    within 2**-24 steps of the random bits, and the rounding of acc / scale, 2**-22 * QMAX steps.
    """
    n, trials = 512, 2000
    grad, zeros = make("gaussian", n, torch.float32)[0], torch.full((n,), -0.0)
    for bits in (8, 4, 2):
        compressor = Quantize(bits, 256, "stochastic", seed=0)
        total = torch.zeros(n, dtype=torch.float64)
        for seed in range(trials):
            fields, dense = compressed(replace(compressor, seed=seed), grad, zeros.clone())
            total += dense
        step = fields[1].double().repeat_interleave(256)
        bound = math.sqrt(math.log(2 * n / 1e-9) / (2 * trials)) + 2.0**-24 + 2.0**-22 * 2 ** (bits - 1)
        assert ((total / trials - grad).abs() / step).max() < bound
        assert not torch.equal(dense, compressed(replace(compressor, seed=0), grad, zeros.clone())[1])


def test_elements_that_share_a_word_hardly_depend_on_each_other() -> None:
    """The covariance of the numbers of elements i and i + 16 d, d = 1, 2 and 3, of every 64 is near 0.

    Of two that share a word, what the first has below its d-th byte is what the other begins with, and the
    other way round: a covariance of 1 / 12 * (2**(-8 d) + 2**(-8 (4 - d))) at most. The mean of T independent
    products, each within 1 / 4 of 0, is further than sqrt(ln(2 / p) / (8 * T)) from its expectation with
    probability p at most (Hoeffding): here 0.0008. A word that two elements took as it is would make 1 / 12.
    """
    groups, sixteen = 1 << 18, 16
    apart = (reference.uniform(-7, groups * 64).double() - 0.5).view(groups, 4, sixteen)
    chance = math.sqrt(math.log(2 / 1e-9) / (8 * groups * sixteen))
    for left in range(4):
        for right in range(left):
            covariance = (apart[:, left] * apart[:, right]).mean()
            d = left - right
            assert abs(covariance) < (2.0 ** (-8 * d) + 2.0 ** (-8 * (4 - d))) / 12 + chance


@pytest.mark.parametrize(
    "compressor",
    [Quantize(8), Quantize(4), Quantize(2, 32), Quantize(2, scale="mean"), STOCHASTIC],
    ids=str,
)
def test_what_is_decoded_and_what_stays_are_what_came(compressor: Quantize) -> None:
    """Over T steps, the sum of what was decoded plus err is the sum of the gradients.

    A step rounds twice: acc = grad + err, and err = acc - decoded, each to within 2**-24 of its result. Both
    results lie within the largest |acc| A plus a scale S, so that T steps err by at most
    T * (2 A + S) * 2**-24; sums are taken in double.
    """
    n, steps = 3000, 50
    err, sent, came = torch.zeros(n), torch.zeros(n).double(), torch.zeros(n).double()
    largest = 0.0
    for step in range(steps):
        grad, _ = make("gaussian", n + step, torch.float32)
        grad = grad[:n]
        came += grad
        largest = max(largest, float((grad + err).abs().max()))
        _, dense = compressed(replace(compressor, seed=step), grad, err)
        sent += dense
    assert ((sent + err - came).abs()).max() <= steps * 3 * largest * 2.0**-24


def test_codes_of_known_values() -> None:
    """Multiples of the scale are exact; halves go to even; packing is little end first."""
    x = torch.zeros(32)
    x[:8] = torch.tensor([7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.0])
    fields, dense = compressed(Quantize(4, 32), x, torch.full((32,), -0.0))
    assert fields[1].tolist() == [1.0]
    assert dense[:8].tolist() == [7.0, -7.0, 0.0, 2.0, 2.0, 0.0, -2.0, 3.0]
    assert fields[0][:4].tolist() == [7 | 9 << 4, 0 | 2 << 4, 2 | 0 << 4, 14 | 3 << 4]


def test_two_levels_of_known_values() -> None:
    x = torch.tensor([1.0, -1.0, 3.0, -5.0] * 8)
    fields, dense = compressed(Quantize(2, 32, scale="mean"), x, torch.full((32,), -0.0))
    assert fields[1].tolist() == [1.0, 4.0]
    assert dense[:4].tolist() == [1.0, -1.0, 4.0, -4.0]
    assert fields[0].tolist() == [2 | 0 << 2 | 3 << 4 | 1 << 6] * 8


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_random_bits(bits: int, rounding: str) -> None:
    n = 40_000
    compressor = Quantize(bits, 32, rounding, seed=0)
    check_case(compressor, "cpu", torch.full((n,), -0.0), bit_patterns(n, 5))
    finite = bit_patterns(n, 6)
    check_case(compressor, "cpu", torch.full((n,), -0.0), torch.where(finite.isfinite(), finite, 0.0))


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from([8, 4, 2]),
    chunk_size=st.sampled_from([32, 64, 512]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    case=st.sampled_from(list(CASES)),
    n=st.integers(1, 1500),
    shards=st.integers(1, 5),
)
def test_any_configuration(
    bits: int, chunk_size: int, rounding: str, seed: int, case: str, n: int, shards: int
) -> None:
    check_case(
        Quantize(bits, chunk_size, rounding, seed), "cpu", *make(case, n, torch.float32), shards=shards
    )


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("compressor", [Quantize(8), STOCHASTIC, Quantize(2, scale="mean")], ids=str)
def test_the_sum_of_bodies_is_that_of_one_after_the_other(
    compressor: Quantize, accumulate: bool, backend: str
) -> None:
    n, ranks = 3001, 3
    kernels = kernels_of(backend)
    layout = compressor.layout(n)
    bodies = torch.zeros(ranks, layout.nbytes, dtype=torch.uint8)
    for rank in range(ranks):
        grad, err = make("few nonfinite" if rank == 1 else "gaussian", n, torch.float32)
        compressor.compress_(grad + rank, err, bodies[rank : rank + 1])
    got, wanted = torch.linspace(-1, 1, n), torch.linspace(-1, 1, n) if accumulate else torch.zeros(n)
    kernels.decompress_sum_(compressor, got, bodies, layout, 0.3, accumulate)
    for body in bodies:
        wanted += torch.tensor(0.3) * reference.decompress(compressor, layout.views(body), n)
    assert same_bytes(one_nan(got), one_nan(wanted))


def kernels_of(backend: str) -> Any:
    if backend == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module(f"gck.kernels.quantize.{'cpu' if backend == 'cpu' else 'gpu'}")


@pytest.mark.parametrize("chunk_size", [32, 512, 1024, 8192])
def test_chunk_sizes_and_shards_in_the_interpreter(chunk_size: int) -> None:
    """More than two groups of chunks a shard, the last group cut by the shard's end."""
    n = 3 * max(1024, chunk_size) + 3 * chunk_size + 9
    for compressor in (Quantize(4, chunk_size, "stochastic", seed=-(2**62)), Quantize(8, chunk_size)):
        check_case(compressor, "interpreter", *make("few nonfinite", n, torch.float16), shards=3)
    check_case(
        Quantize(2, chunk_size, scale="mean"), "interpreter", *make("gaussian", n, torch.float32), shards=2
    )


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize("first", [64, 3 << 36, (1 << 36) - 512])
def test_a_part_rounds_as_it_does_in_the_whole(first: int, backend: str) -> None:
    """By the random numbers of its place, which may need the upper word of a counter, from 2**36 on."""
    kernels_of(backend)
    compressor = STOCHASTIC.at(first)
    assert compressor.first == compressor.server_for(3).first == first
    assert compressor.at(128).first == first + 128
    assert compressor == STOCHASTIC
    check_case(compressor, backend, *make("gaussian", 3000, torch.float32), shards=3)
    check_case(compressor, backend, *make("gaussian", 999, torch.bfloat16))
    with_half_of_the_words = replace(STOCHASTIC, chunk_size=32, first=first + 32)
    check_case(with_half_of_the_words, backend, *make("gaussian", 999, torch.float32))


def test_random_bits_in_the_interpreter() -> None:
    n = 4000
    for compressor in (Quantize(8, 32), Quantize(2, 32, "stochastic", seed=0), Quantize(2, 32, scale="mean")):
        check_case(compressor, "interpreter", torch.full((n,), -0.0), bit_patterns(n, 7))


def test_launches_do_not_depend_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values and seeds, and contraction pinned off."""
    kernels = kernels_of("interpreter")
    runs = []
    for case, seed in (("gaussian", 1), ("all nan", 2**63 - 1), ("all zero", -1)):
        compressor = replace(STOCHASTIC, seed=seed)
        grad, err = make(case, 5000, torch.float32)
        body = torch.zeros(1, compressor.layout(5000).nbytes, dtype=torch.uint8)
        fields = compressor.layout(5000).views(body[0])

        def run(
            arguments: tuple[Any, ...] = (compressor, grad, err, body, None), fields: Any = fields
        ) -> None:
            kernels.compress_(*arguments)
            kernels.decompress_(arguments[0], arguments[2], fields, 1.0, True)

        runs.append([(fn.__name__, grid, kwargs) for fn, grid, kwargs in recorded(monkeypatch, run)])
    assert [name for name, _, _ in runs[0]] == ["compress_kernel", "decompress_kernel"]
    assert runs[0] == runs[1] == runs[2]
    assert all(options["enable_fp_fusion"] is False for _, _, options in runs[0])


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bits": 3}, ArgumentError, "bits must be one of 8, 4, 2, got 3"),
    ({"bits": 4.0}, DtypeError, r"bits must be an int, got 4.0 \(float\)"),
    ({"bits": True}, DtypeError, r"bits must be an int, got True \(bool\)"),
    ({"chunk_size": 48}, ArgumentError, r"chunk_size must be a power of two in \[32, 8192\], got 48"),
    ({"chunk_size": 16384}, ArgumentError, "got 16384"),
    ({"rounding": "down"}, ArgumentError, 'rounding must be "nearest" or "stochastic", got \'down\''),
    ({"scale": "rms"}, ArgumentError, 'scale must be "max" or "mean", got \'rms\''),
    ({"scale": "mean"}, ArgumentError, 'scale "mean" needs 2 bits, got 4'),
    (
        {"bits": 2, "scale": "mean", "rounding": "stochastic"},
        ArgumentError,
        'scale "mean" needs rounding "nearest", got "stochastic"',
    ),
    ({"first": 1.5}, DtypeError, r"first must be an int, got 1.5 \(float\)"),
    ({"first": 300}, ArgumentError, "first must be a multiple of chunk_size 256 .*, got 300"),
    ({"first": -256}, ArgumentError, "got -256"),
    ({"seed": 1.5}, DtypeError, r"seed must be an int, got 1.5 \(float\)"),
    ({"seed": 2**63}, ArgumentError, r"seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
]


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS, ids=str)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^Quantize: .*{text}"):
        Quantize(**options)


def test_compressors_that_differ_in_their_seed_alone_are_equal() -> None:
    assert Quantize(seed=1) == Quantize(seed=2) != Quantize(8)
    assert Quantize(seed=1).server_for(2).seed not in (1, 2)


def test_payloads_that_do_not_fit() -> None:
    compressor = Quantize(4, 32)
    for codes, scales in ((15, 1), (16, 0)):
        fields = torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales)
        with pytest.raises(CorruptPayloadError, match="does not fit 32 elements"):
            compressor.check_fields("f", 32, fields)
    with pytest.raises(DtypeError, match="must hold uint8 codes and float32 scales"):
        compressor.check_fields("f", 32, (torch.zeros(16), torch.zeros(1)))


def test_sizes() -> None:
    assert Quantize(8, 256).layout(1000) == Layout.of((torch.uint8, 1000), (torch.float32, 4))
    assert Quantize(4, 256).layout(1001) == Layout.of((torch.uint8, 501), (torch.float32, 4))
    assert Quantize(2, 256, scale="mean").layout(1) == Layout.of((torch.uint8, 1), (torch.float32, 2))


@pytest.mark.parametrize("world", [1, 3])
def test_nan_levels_change_their_sign_with_the_code(world: int) -> None:
    """On every processor alike: ranks compare bits."""
    codes, nans = torch.full((64,), 0b11100100, dtype=torch.uint8), torch.full((1, 2), math.nan)
    payload = gck.Quantized(codes, nans, 256, 256, 2, "mean")
    out = gck.decompress(payload if world == 1 else [payload] * world)
    assert bool(out.isnan().all())
    if world == 1:
        assert torch.signbit(out).view(-1, 4).tolist() == [[True, True, False, False]] * 64
