"""Options at their limits: clips above all numbers and at 0; top-k in few bytes, which has no statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import gck
from gck.errors import ArgumentError, DtypeError, ShapeMismatchError
from tests.cases import make, same_bytes
from tests.contract import check_case, kernels_of
from tests.kernels.test_options import FUNCTIONS


@pytest.mark.parametrize("backend", ["cpu", "interpreter"])
@pytest.mark.parametrize(
    "compressor", [gck.TopK(0.1, index_codec="block16"), gck.TopK(0.1, value_bits=4)], ids=str
)
def test_coded_top_k_reads_its_residual_as_others_do(compressor: gck.TopK, backend: str) -> None:
    """With decay and clip; statistics of few bits, which need what the codes lose, are refused."""
    for case in ("gaussian", "few nonfinite"):
        check_case(replace(compressor, decay=0.9, clip=0.3), backend, *make(case, 3000, torch.float32))


def test_coded_values_have_no_statistics() -> None:
    compressor, err, stats = gck.TopK(0.1, value_bits=4), torch.ones(300), torch.ones(5, dtype=torch.float64)
    body = torch.zeros(1, compressor.layout(300).nbytes, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="TopK: no statistics are taken of values of 4 bits"):
        kernels_of("cpu", compressor)[0].compress_(compressor, torch.ones(300), err, body, None, stats=stats)
    assert torch.equal(err, torch.ones(300))
    assert torch.equal(stats, torch.ones(5, dtype=torch.float64))
    assert not body.any()


@pytest.mark.parametrize(
    "clip", [3.5e38, 1e300, 10**400, math.inf], ids=["3.5e38", "1e300", "10**400", "inf"]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_clip_above_all_numbers_bounds_none(function: str, clip: float) -> None:
    grad, err = make("gaussian", 3000, torch.float32)
    clipped = err.clone()
    FUNCTIONS[function](grad, clipped, clip=clip)
    FUNCTIONS[function](grad, err)
    assert same_bytes(clipped, err)


@pytest.mark.parametrize("clip", [1e300, 10**400], ids=["1e300", "10**400"])
def test_so_does_that_of_a_compressor(clip: float) -> None:
    left = []
    for compressor in (gck.Sign(64), gck.Sign(64, clip=clip)):
        grad, err = make("gaussian", 3000, torch.float32)
        compressor.compress_(grad, err, torch.zeros(1, compressor.layout(3000).nbytes, dtype=torch.uint8))
        left.append(err)
    assert same_bytes(*left)


ZERO = 2.0**-150  # lies halfway to the least number, and is rounded to even


@pytest.mark.parametrize("value", [ZERO, 1e-46, 5e-324])
@pytest.mark.parametrize("name", ["decay", "clip"])
def test_what_fp32_rounds_to_0_is_refused(name: str, value: float) -> None:
    text = f"{name} must be .* as fp32 rounds it, got {value}"
    grad, err = torch.ones(300), torch.ones(300)
    for call in FUNCTIONS.values():
        with pytest.raises(ArgumentError, match=f"_ef_: {text}"):
            call(grad, err, **{name: value})
    for make_one in (gck.Sign, gck.Quantize, gck.ChunkTopK):
        with pytest.raises(ArgumentError, match=text):
            make_one(**{name: value})
    assert torch.equal(err, torch.ones(300))


@pytest.mark.parametrize("name", ["decay", "clip"])
def test_the_least_number_is_not_0(name: str) -> None:
    err = torch.ones(300)
    gck.topk_ef_(torch.zeros(300), err, k=1, **{name: math.nextafter(ZERO, 1.0)})  # type: ignore[call-overload]
    assert err.count_nonzero() == 299


@pytest.mark.parametrize("decay", [True, False, torch.tensor(1.0), "1"], ids=str)
def test_decays_that_are_no_numbers(decay: Any) -> None:
    grad, err = torch.ones(300), torch.ones(300)
    for call in FUNCTIONS.values():
        with pytest.raises(DtypeError, match="_ef_: decay must be a number, got "):
            call(grad, err, decay=decay)
    with pytest.raises(DtypeError, match=r"^topk_ef_: decay must be a number, got "):
        gck.topk_ef_([grad], [err], k=3, decay=decay)  # type: ignore[call-overload]
    assert torch.equal(err, torch.ones(300))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_statistics_of_another_shape(shape: tuple[int, int]) -> None:
    stats = gck.Statistics(torch.ones(shape, dtype=torch.float64))
    grad, err = torch.ones(300), torch.ones(300)
    for call in FUNCTIONS.values():
        with pytest.raises(ShapeMismatchError, match=r"_ef_: stats must have shape \(5,\), got "):
            call(grad, err, stats=stats)
    assert torch.equal(err, torch.ones(300))
    assert torch.equal(stats.values, torch.ones(shape, dtype=torch.float64))
