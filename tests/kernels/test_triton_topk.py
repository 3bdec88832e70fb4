"""Top-k in Triton's interpreter: each path through guess, stream, refine and emit, byte by byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gck
from bench import inputs
from tests.cases import CASES, GRAD_DTYPES, make

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.kernels.topk import gpu, gpu_bracket, gpu_guess, gpu_stream
from gck.kernels.topk.gpu_refine import COUNT, RESTORE
from tests.contract import check_case
from tests.kernels.bits import bit_patterns
from tests.kernels.launches import recorded
from tests.kernels.topk_paths import KNOWN, LIST, NEAR, SCAN, SMALL, check, key_of, rows, shrink

N = 6 * gpu_stream.TILE + 5  # of the tiles that are compiled


@pytest.mark.parametrize("case", CASES)
def test_over_many_tiles(case: str) -> None:
    turn = list(CASES).index(case)
    compressor = [
        gck.TopK(ratio=0.01),
        gck.TopK(ratio=0.3, value_dtype=torch.bfloat16),
        gck.TopK(k=700, value_dtype=torch.float16),
        gck.TopK(k=N),
    ][turn % 4]
    check_case(compressor, "interpreter", *make(case, N, GRAD_DTYPES[turn % 3]))


@pytest.mark.parametrize("case", CASES)
def test_sampled(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    turn = list(CASES).index(case)
    grad, err = make(case, SMALL, GRAD_DTYPES[turn % 3])
    for k in ((1, SMALL // 10), (40, SMALL // 4))[turn % 2]:
        check(gck.TopK(k=k, value_dtype=GRAD_DTYPES[(turn + k) % 3]), grad, err)


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_hard_inputs(name: str) -> None:
    """By the real sample; `inputs.count_of(n)` are as many as are not zero, where those are few."""
    n = gpu_guess.MIN_SAMPLED + 7
    grad, err = inputs.make(name, n)
    turn = list(inputs.INPUTS).index(name)
    check(gck.TopK(k=inputs.count_of(n), value_dtype=GRAD_DTYPES[turn % 3]), grad, err)


def test_periodic_with_the_sample() -> None:
    """Large every so many entries as lie between the lines of a sample."""
    n, k = 2 * gpu_guess.MIN_SAMPLED + 7, 10_000
    lines, _, _ = gpu_bracket.sample_shape(n, k, gpu_bracket.LINES, gpu_bracket.CANDIDATES)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0))
    grad[:: n // gpu_guess.LINE // lines * gpu_guess.LINE] *= 100
    check(gck.TopK(k=k), grad, torch.zeros(n))


def test_the_real_sample() -> None:
    """By one program, and by three."""
    n = gpu_guess.MIN_SAMPLED + 7
    for size in (n, 600_007):
        assert check(gck.TopK(ratio=0.01), *make("gaussian", size, torch.float32)) == NEAR
    assert check(gck.TopK(ratio=0.01), *make("gaussian", n, torch.bfloat16), aligned=True) == NEAR


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 12 * 256 - 1, 12 * 256, 20 * 256 + 1])
def test_sizes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for k in {1, -(-n // 7), n}:
        check(gck.TopK(k=k), *make("few nonfinite", n, torch.float32))


def test_guess_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    data = make("gaussian", SMALL, torch.float32)
    assert check(gck.TopK(k=100), *data, hint=key_of(3.0)) == SCAN  # some are listed
    assert check(gck.TopK(k=100), *data, hint=key_of(1e30)) == SCAN  # none


@pytest.mark.parametrize("capacity", [100, 333, 1500])
def test_list_overflows(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tiles fit, later ones do not, and a short last one may fit again."""
    shrink(monkeypatch, capacity)
    for case in ("gaussian", "nonfinite"):
        data = make(case, SMALL, torch.float32)
        for value_dtype in (torch.float32, torch.bfloat16):
            compressor = gck.TopK(k=90, value_dtype=value_dtype)
            assert check(compressor, *data, hint=key_of(0.3)) == SCAN


def test_list_full_to_the_last_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, err = torch.zeros(SMALL), torch.zeros(SMALL)
    grad[5::40] = torch.arange(1.0, len(grad[5::40]) + 1)
    listed = int((grad != 0).sum())
    for capacity, mode in ((listed, LIST), (listed - 1, SCAN)):
        shrink(monkeypatch, capacity)
        assert check(gck.TopK(k=20), grad, err, hint=key_of(1.0)) == mode


def test_one_level_of_the_search_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys in a bin of the bracket than are set apart, a threshold above the bracket, and many ties
    beside it take more."""
    shrink(monkeypatch)
    monkeypatch.setattr(gpu_guess, "list_capacity", lambda n, k, lines, part: n)
    monkeypatch.setattr(gpu_guess, "listing", lambda n, k: True)
    order = torch.randperm(SMALL, generator=torch.Generator().manual_seed(1))
    spread, nothing = torch.linspace(1.0, 2.0, SMALL)[order], torch.zeros(SMALL)
    for k, low in ((500, 1.8), (3900, 1.0), (5, 1.99)):
        assert check(gck.TopK(k=k), spread, nothing, hint=key_of(low / 0.97)) == NEAR
    assert check(gck.TopK(k=500), spread, nothing, hint=key_of(0.5)) == LIST
    dense = 1.5 + torch.arange(SMALL)[order] * 2.0**-22
    for k in (1, 500, 3900):
        assert check(gck.TopK(k=k), dense, nothing, hint=key_of(1.5 / 0.98)) == LIST
    for ties in (1, 20, 700):
        tied = spread.clone()
        tied[torch.arange(0, SMALL, 4)[:ties]] = 1.9
        for k in (380, 400, 410, 500):
            check(gck.TopK(k=k), tied, nothing, hint=key_of(1.85))


def test_ties_are_counted_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1100)
    ones, nothing = torch.ones(SMALL), torch.zeros(SMALL)
    for k in (1, 257, 1000):
        assert check(gck.TopK(k=k), ones, nothing) == KNOWN
    # A few rows of an embedding: k reaches into the zeros, of either sign.
    sparse = torch.where(torch.arange(SMALL) % 50 < 2, torch.randn(SMALL), 0.0)
    sparse[1::2] *= -1
    assert check(gck.TopK(k=900), sparse, -nothing) == KNOWN
    # Ties below the guess's bin edge: winners before and after all of them.
    mixed = torch.full((SMALL,), 1.015625)
    mixed[::100], mixed[-3:] = -7.0, 9.0
    assert check(gck.TopK(k=900), mixed, nothing) == KNOWN
    # Enough lie above the ties that are too many to list.
    mixed[::4] = torch.linspace(2, 3, len(mixed[::4]))
    assert check(gck.TopK(k=900), mixed, nothing) == NEAR


def test_close_values_need_the_exact_key_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1000)
    order = torch.randperm(SMALL, generator=torch.Generator().manual_seed(0))
    grad = torch.linspace(1.0, 1.01, SMALL)[order]
    assert check(gck.TopK(k=300), grad, torch.zeros(SMALL)) == NEAR


GARBAGE = [-(2**31), -1, 0, 1, 0x7FFFFFFF, 0x7F800000, 0x7F800001, key_of(1.0)]


@pytest.mark.parametrize("case", ["gaussian", "all nan", "all zero", "nonfinite", "denormal", "huge"])
def test_no_hint_changes_the_result(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1000)
    data = make(case, SMALL, torch.float32)
    for hint in GARBAGE if case in ("gaussian", "nonfinite") else GARBAGE[1::3]:
        check(gck.TopK(k=60), *data, hint=hint)


def test_the_last_threshold_is_a_good_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    grad, err = make("gaussian", SMALL, torch.float32)
    exact = (grad + err).abs().sort(descending=True).values
    assert check(gck.TopK(k=60), grad, err, hint=key_of(float(exact[60]))) == NEAR


@pytest.mark.parametrize("n", [100, SMALL])
def test_a_hint_is_left_where_nothing_is_sampled(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(gpu_guess, "MIN_SAMPLED", 2**20)
    assert check(gck.TopK(k=50), *make("ties", n, torch.float32), hint=0) == SCAN


@pytest.mark.parametrize("programs", [1, 3])
def test_a_programs_share_of_err_lies_in_several_groups(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, 1100)
    monkeypatch.setattr(gpu, "INTERPRETED_PROGRAMS", programs)  # 16 tiles, groups of 8
    assert check(gck.TopK(k=1000), torch.ones(SMALL), torch.zeros(SMALL)) == KNOWN
    data = make("gaussian", SMALL, torch.float32)
    assert check(gck.TopK(k=300), *data, hint=key_of(4.0)) == SCAN
    assert check(gck.TopK(k=3000), *data) == SCAN


TIE_COUNTS = [256, 257, 8 * 256 - 1, 8 * 256, SMALL - 1]


@pytest.mark.parametrize("k", TIE_COUNTS)
def test_ties_end_anywhere_in_a_run(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    check(gck.TopK(k=k), torch.ones(SMALL), torch.zeros(SMALL))


TOGETHER: dict[str, Any] = {
    "sorted up": lambda: torch.linspace(0.1, 9.0, SMALL),
    "sorted down": lambda: torch.linspace(9.0, 0.1, SMALL),
    "rows": lambda: rows(SMALL, 128, 2.0)[0],
    "a block of ties": lambda: torch.where((torch.arange(SMALL) - 700).abs() < 250, 3.0, torch.randn(SMALL)),
    "infinities beside each other": lambda: torch.cat(
        [torch.full((300,), math.inf), torch.randn(SMALL - 300)]
    ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_long_tiles_are_shared_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(gpu, "LONG", 2)
    grad = TOGETHER[case]()
    for k in (60, 400, SMALL // 4):
        for value_dtype in (torch.float32, torch.bfloat16):
            seen: dict[str, int] = {}
            mode = check(gck.TopK(k=k, value_dtype=value_dtype), grad, torch.zeros(SMALL), seen=seen)
            if case in ("sorted up", "sorted down", "rows"):
                assert seen["clustered"] == 1
                assert mode in (LIST, NEAR)
                assert seen["long"] > 0
    scattered = make("gaussian", SMALL, torch.float32)
    assert check(gck.TopK(k=400), *scattered, seen=seen) == NEAR
    assert (seen["clustered"], seen["long"]) == (0, 0)


def test_the_bracket_has_a_list_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what is not surely among the winners, unless ties are counted instead."""
    shrink(monkeypatch)
    grad, err = make("gaussian", SMALL, torch.float32)
    keys = (grad + err).abs().view(torch.int32)
    for k in (100, 400, SMALL // 4):
        seen: dict[str, int] = {}
        assert check(gck.TopK(k=k), grad, err, seen=seen) == NEAR
        assert seen["listed"] == int((keys >= seen["guess"]).sum())
        assert seen["close"] == int(((keys >= seen["guess"]) & (keys < seen["stop"])).sum())
        assert seen["listed"] - seen["close"] < k
    monkeypatch.setattr(gpu, "BRACKET_SHARE", 2**20)  # no room: the list is searched
    for k in (100, 400, SMALL // 4):
        assert check(gck.TopK(k=k), grad, err, seen=seen) == NEAR
        assert seen["close"] > 0


@pytest.mark.parametrize("case", ["gaussian", "ties", "all zero", "nonfinite", "clustered", "sorted"])
def test_counts_that_need_a_word_each(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vector past 2**31 elements takes: no list of the bracket, no long tiles."""
    shrink(monkeypatch)
    monkeypatch.setattr(gpu, "MOST_IN_HALF", 0)
    for k in (40, 500):
        check(gck.TopK(k=k), *make(case, SMALL, torch.float32))


def test_winners_before_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    grad = torch.full((SMALL,), 0.5)
    grad[-3:] = 2.0  # the last program's; every tie lies before them
    for k in (3, 300, 2500):
        check(gck.TopK(k=k), grad, torch.zeros(SMALL))


@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
def test_random_bits(value_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    err = bit_patterns(SMALL, 1)
    for k in (1, 100, SMALL):
        check(gck.TopK(k=k, value_dtype=value_dtype), torch.full((SMALL,), -0.0), err)


@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
def test_rounding(value_dtype: torch.dtype) -> None:
    """Halfway cases of both narrow types, their largest values and just beyond, denormals of fp16."""
    odd = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0, 3.3895e38]
    tiny = [2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-149, 2.0**-133, 2.0**-134, 3 * 2.0**-134]
    err = torch.tensor([*odd, *tiny, 3.4028235e38, 3.39e38, 0.0, math.inf, math.nan])
    err = torch.cat([err, -err])
    check_case(gck.TopK(ratio=1.0, value_dtype=value_dtype), "interpreter", torch.zeros(len(err)), err)


def test_what_loses_to_nan_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    grad, err = make("gaussian", SMALL, torch.float32)
    grad[7::130] = math.inf  # in tiles with no winner at all
    grad[5] = err[6] = math.nan
    assert check(gck.TopK(k=2), grad, err) == LIST
    assert check(gck.TopK(k=2), grad, err, hint=0x7FFFFFFF) == LIST
    monkeypatch.setattr(gpu_guess, "MIN_SAMPLED", 2**20)
    assert check(gck.TopK(k=2), grad, err) == SCAN


def test_infinities_are_listed_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 800)
    grad = torch.full((SMALL,), math.inf)
    for k in (5, 600):
        assert check(gck.TopK(k=k), grad, torch.zeros(SMALL)) == SCAN
    grad[3::9] = math.nan
    assert check(gck.TopK(k=5), grad, torch.zeros(SMALL)) == SCAN
    grad[::2] = 1.0
    monkeypatch.setattr(gpu_guess, "list_capacity", lambda n, k, lines, part: 3000)
    assert check(gck.TopK(k=5), grad, torch.zeros(SMALL)) == LIST


def test_the_mode_does_not_depend_on_the_tensors_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for aligned in (False, True):
        for dtype in GRAD_DTYPES:
            data = make("gaussian", SMALL, dtype)
            assert check(gck.TopK(k=44), *data, aligned=aligned) == NEAR


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values, whatever the mode, and contraction pinned off."""
    shrink(monkeypatch, 1000)
    shapes = []
    for case in ("gaussian", "all nan", "all zero"):
        data = make(case, SMALL, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            launches = recorded(patch, lambda data=data: check(gck.TopK(k=60), *data, hint=0))
        assert all(kwargs["enable_fp_fusion"] is False for _, _, kwargs in launches)
        shapes.append([(fn.__name__, grid, kwargs) for fn, grid, kwargs in launches])
    assert len(shapes[0]) == 5 + COUNT.value - RESTORE.value  # on a GPU, `refine` is one launch
    assert shapes[0] == shapes[1] == shapes[2]
