"""Statistics taken around a call: the bytes of the oracle on every backend, and nothing is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.kernels.common import measure
from gck.kernels.common.measure import Measurement
from gck.kernels.reference import read_residual, statistics
from tests.cases import CASES, GRAD_DTYPES, Guarded, make, same_bytes

# Sums of one level and of two, parts of a block, of a program and of a tile.
SIZES = [1, 511, 512, 513, 2049, 5001]
READINGS = [gck.Sign(), gck.Sign(decay=0.9), gck.Sign(clip=0.3), gck.Sign(decay=0.5, clip=1e39)]


def check(grad: Tensor, err: Tensor, reading: Any, device: str = "cpu") -> None:
    g, e = Guarded.of(grad.to(device)), Guarded.of(err.to(device))
    left = make("few nonfinite", grad.numel(), torch.float32)[0].nan_to_num(1.5, 2.5, -3.5)
    wanted = statistics(grad.float() + read_residual(reading, err), left, 17)
    begun = Measurement(reading, g.inner, e.inner)
    assert same_bytes(g.inner, grad)
    assert same_bytes(e.inner, err)
    assert same_bytes(begun.finish(left.to(device), 17), wanted)
    assert g.intact()
    assert e.intact()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setattr(measure, "Host", measure._device())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_cpu(reading: Any, case: str) -> None:
    turn = list(CASES).index(case)
    for i, n in enumerate([*SIZES, 300_007]):
        check(*make(case, n, GRAD_DTYPES[(turn + i) % 3]), reading)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", CASES)
def test_interpreter(case: str) -> None:
    turn = list(CASES).index(case)
    for i, n in enumerate(SIZES):
        check(*make(case, n, GRAD_DTYPES[(turn + i) % 3]), READINGS[(turn + i) % len(READINGS)])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_cuda(reading: Any, case: str) -> None:
    for i, n in enumerate([*SIZES, 1_000_003]):
        check(*make(case, n, GRAD_DTYPES[i % 3]), reading, "cuda")


def test_thread_count_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            check(*make("few nonfinite", 300_007, torch.bfloat16), READINGS[3])
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(
    case=st.sampled_from(list(CASES)),
    dtype=st.sampled_from(GRAD_DTYPES),
    n=st.integers(1, 5000),
    decay=st.floats(0, 1, exclude_min=True, width=32),
    clip=st.one_of(st.none(), st.floats(1e-30, math.inf)),
)
def test_any_reading(case: str, dtype: torch.dtype, n: int, decay: float, clip: float | None) -> None:
    check(*make(case, n, dtype), gck.Sign(decay=max(decay, 1e-40), clip=clip))


def test_what_knows_no_decay_reads_the_residual_as_it_is() -> None:
    grad, err = make("gaussian", 700, torch.float32)
    values = Measurement(object(), grad, err).finish(err, 3)  # type: ignore[arg-type]
    assert same_bytes(values, statistics(grad + err, err, 3))
