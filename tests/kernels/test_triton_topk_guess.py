"""The sample of the GPU's top-k, and what is guessed from it, in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import gck
from tests.cases import make

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.kernels.topk import gpu, gpu_guess
from gck.kernels.topk.gpu_bracket import sample_shape
from gck.kernels.topk.gpu_control import CLUSTERED, GUESS, TIE, WORDS
from tests.kernels.topk_paths import SCAN, SMALL, check, rows, shrink


@triton.jit
def places_kernel(p_places: Any, stride: int, LINES: tl.constexpr) -> None:  # noqa: N803
    b_line = tl.arange(0, LINES)
    tl.store(p_places + b_line, gpu_guess.place_of_line(b_line, stride))


def sampled(n: int, k: int) -> Tensor:
    """The indices that are sampled of n elements, to find k of them."""
    lines = gpu.sampled_lines(n, k)
    size = triton.next_power_of_2(lines)
    places = torch.zeros(size, dtype=torch.int64)
    places_kernel[(1,)](places, n // gpu_guess.LINE // lines, size)
    return (places[:lines, None] * gpu_guess.LINE + torch.arange(gpu_guess.LINE)).view(-1)


def test_the_sample_has_a_line_of_each_stratum() -> None:
    n = 300_007
    lines = sampled(n, n // 100).view(-1, gpu_guess.LINE)
    stride = n // gpu_guess.LINE // len(lines)
    first = lines[:, 0] // gpu_guess.LINE
    assert torch.equal(lines, (first * gpu_guess.LINE)[:, None] + torch.arange(gpu_guess.LINE))
    assert torch.equal(first // stride, torch.arange(len(lines)))
    jitter = first % stride
    assert len(jitter.unique()) > stride // 2
    assert abs(float(jitter.double().mean()) - stride / 2) < stride / 10


# Elements so many that the sample has parts for several programs, at any density.
GUESSED: dict[str, Any] = {
    **{
        case: lambda case=case: make(case, 2**22 + 5, torch.float32)
        for case in ("gaussian", "clustered", "periodic", "sorted", "ties", "all zero", "denormal")
    },
    "rows of 64": lambda: rows(2**19, 64, 1.0),
    "rows of 768": lambda: rows(2**20, 768, 3.0),
}
DENSITIES = (
    0.00001,
    0.0001,
    0.001,
    0.01,
    0.0125,
    0.03,
    0.0355,
    0.0625,
    0.087,
    0.1,
    0.15,
    0.17,
    0.18,
    0.19,
    0.25,
)


@pytest.mark.parametrize("case", GUESSED)
def test_a_guess_by_many_programs_lists_enough_and_not_too_much(case: str) -> None:
    """The guess alone, which reads little of a large vector, and what the stream would make of it."""
    grad, err = GUESSED[case]()
    n, keys = grad.numel(), (grad + err).abs().view(torch.int32)
    for density in DENSITIES:
        k = int(n * density)
        lines = gpu.sampled_lines(n, k)
        assert triton.cdiv(lines, gpu.LINES) > 1
        _, share, room = sample_shape(n, k, gpu.LINES, gpu.CANDIDATES)
        capacity = gpu_guess.list_capacity(n, k, lines, gpu.LINES)
        control = torch.zeros(WORDS, dtype=torch.int64)
        gpu.guess_kernel[(triton.cdiv(lines, gpu.LINES),)](
            *(grad, err, control, torch.zeros(room, dtype=torch.int32), control),
            *(n, lines, n // gpu_guess.LINE // lines, k / n, capacity, 1.0, err),
            LINES=gpu.LINES,
            LINE=gpu_guess.LINE,
            SHARE=share,
            CANDIDATES=room,
            RESIDUAL=0,
            HINT=False,
        )
        guess, tie = (int(control[word.value]) for word in (GUESS, TIE))
        if case == "gaussian" or (case == "rows of 768" and density >= 0.001):
            assert int(control[CLUSTERED.value]) == (case != "gaussian"), density
        listed = int((keys >= guess).sum())
        ties = int((keys == tie - 1).sum()) if tie else 0
        assert listed <= capacity, (density, listed / k)
        assert listed + ties >= k, density
        if case == "gaussian" and density >= 0.01:
            assert listed < 1.3 * k, density


def test_too_few_ties_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample sees nothing but one key, which nothing else has."""
    shrink(monkeypatch, 1000)
    monkeypatch.setattr(gpu_guess, "SAMPLE_FRACTION", 16)
    places = sampled(SMALL, 700)
    grad = torch.linspace(0.1, 0.9, SMALL)
    grad[places] = 5.0
    assert len(places) < 700
    assert check(gck.TopK(k=700), grad, torch.zeros(SMALL)) == SCAN


def test_capacity_holds_the_worst_margin() -> None:
    for n in (2**16, 10**6, 10**8, 2**31 + 5):
        for k in {1, 10, 1000, n // 1000, n // 100, n // 10, n // 4}:
            lines = gpu.sampled_lines(n, k)
            sampled = lines * gpu_guess.LINE
            expected = k / n * sampled
            worst = (expected + 5 * math.sqrt(16 * expected) + 8) * n / sampled
            assert min(n, worst) <= gpu_guess.list_capacity(n, k, lines, gpu.LINES) <= n, (n, k)
