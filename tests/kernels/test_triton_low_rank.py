"""Low rank in Triton's interpreter: every byte against the oracle, of the whole and of each step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.kernels.low_rank import LowRank, reference
from gck.kernels.low_rank.matrices import Matrices, Shape
from gck.kernels.reference import read_residual, statistics
from tests.cases import GRAD_DTYPES, Guarded, make, one_nan, same_bytes
from tests.contract import check_case
from tests.kernels.launches import recorded

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.kernels.low_rank import gpu, gpu_back_project, gpu_matrix, gpu_orthonormal

# (elements, columns, rank)
SHAPES = (
    (1, None, 4),
    (7, None, 4),
    (9, 9, 3),  # one row
    (9, 1, 3),  # one column
    (70, 1, 1),
    (5 * 64, 64, 3),  # whole tiles
    (12 * 64 - 1, 64, 4),  # the last row is cut short
    (17 * 100 - 63, 100, 4),  # rows of a multiple of 4, the last one of some of them
    (3 * 333 - 332, 333, 8),  # a last row of one element; tiles that are cut; more rank than rows
    (9 * 640, 640, 9),  # a batch of tiles, and two groups of ranks that overlap
    (301 * 5 - 2, 5, 3),  # two blocks of rows
)


def tall(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + rows)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(("n", "columns", "rank"), SHAPES)
def test_shapes(n: int, columns: int | None, rank: int) -> None:
    check_case(LowRank(rank, columns, seed=-1), "interpreter", *make("gaussian", n, torch.float32))
    check_case(LowRank(rank, columns, seed=9), "interpreter", *make("outlier", n, torch.bfloat16))


@pytest.mark.parametrize("case", ["all zero", "minus zero", "all equal", "nonfinite", "denormal", "huge"])
def test_values(case: str) -> None:
    for columns, rank in ((None, 4), (9, 1)):
        grad, err = make(case, 430, torch.float32)
        check_case(LowRank(rank, columns, seed=2**63 - 1), "interpreter", grad, err)


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"decay": 0.7}, {"clip": 0.3}, {"decay": 0.5, "clip": 1e-3}], ids=str)
def test_residuals_as_they_are_read(options: dict[str, Any], dtype: torch.dtype) -> None:
    for case in ("gaussian", "few nonfinite"):
        check_case(LowRank(2, seed=3, **options), "interpreter", *make(case, 400, dtype))


def test_what_two_columns_span() -> None:
    """What remains of such a matrix is about nothing; of rows that are alike, all but one become zeros."""
    grad = (tall(40, 2) @ tall(2, 30)).reshape(-1)
    compressor = LowRank(4, 30)
    check_case(compressor, "interpreter", grad, torch.zeros(1200))
    body = torch.zeros(compressor.layout(1200).nbytes, dtype=torch.uint8)
    err = torch.zeros(1200)
    gpu.compress_(compressor, grad, err, body, None)
    left = compressor.layout(1200).views(body)[0].view(4, 40)
    assert left[:2].any(1).all()
    assert err.norm() < 1e-5 * grad.norm()
    left = torch.ones(3, 40)
    gpu.orthonormalise_(rows_alone(left), [left])
    assert left[0].any()
    assert not left[1:].any()


def test_infinities_past_a_row_s_end() -> None:
    """Elements that the last row lacks are zeros, which an infinite row of left turns into NaN."""
    acc, left = tall(3, 10).reshape(-1)[:24].clone(), torch.ones(2, 3)
    left[1, 2] = math.inf
    compressor = LowRank(2, 10)
    wanted = reference.back_project(compressor, acc, left)
    assert wanted[1, 4:].isnan().all()
    right = torch.full((2, 10), 7.0)
    gpu.back_project_(compressor.alone(24), [acc], [left], [right])
    assert same_bytes(right, wanted)


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (3, 700), (8, 129), (64, 40)])
def test_basis(rank: int, columns: int) -> None:
    for seed in (0, -(2**63), 77):
        basis = Guarded.of(torch.full((rank * columns,), math.nan))
        gpu.basis_(LowRank(rank, columns, seed), basis.inner.view(rank, columns))
        assert same_bytes(basis.inner.view(rank, columns), reference.basis(seed, rank, columns))
        assert basis.intact()


@pytest.mark.parametrize("case", ["gaussian", "minus zero", "few nonfinite", "denormal"])
@pytest.mark.parametrize(("n", "columns", "rank"), [(27 * 70 - 5, 70, 3), (9 * 320, 320, 9)])
def test_project(n: int, columns: int, rank: int, case: str) -> None:
    compressor = LowRank(rank, columns, decay=0.9, clip=0.4)
    rows = compressor.shape(n).rows
    grad, err = make(case, n, torch.bfloat16)
    acc = one_nan(grad.float() + read_residual(compressor, err))
    basis = tall(rank, columns)
    basis[0, -1] = math.inf  # which only what lies past the end of the last row meets as a zero
    e, left = Guarded.of(err), Guarded.of(torch.full((rank * rows,), math.nan))
    clip = torch.tensor([0.4])
    a = Guarded.of(torch.full((n,), math.nan))
    for written in (a, e):  # what is read may be what is written
        given = [grad], [e.inner], [basis], [written.inner], [left.inner.view(rank, rows)]
        gpu.project_(compressor.alone(n), *given, clip)
        assert same_bytes(written.inner, acc)
        assert same_bytes(left.inner.view(rank, rows), reference.project(compressor, acc, basis))
        assert all(guarded.intact() for guarded in (a, e, left))


def rows_alone(left: Tensor) -> Matrices:
    """What knows of no more than left."""
    rank, rows = left.shape
    return Matrices("", [rows], [Shape(rows, 1, rank)])


def rows_of(kind: str, rank: int, length: int) -> Tensor:
    left = tall(rank, length)
    if kind == "dependent" and rank > 1:
        left[1] = left[0] * 3
        left[-1] = left[0] - left[rank // 2]
    elif kind == "nearly dependent":  # one part that is left of 2^30 decides
        left[1:] = left[:1] + left[1:] * 2.0**-14.9
    elif kind == "some zero":
        left[0], left[rank // 2] = 0.0, -0.0
    elif kind == "nan":
        left[rank // 2, length // 3] = math.nan
    elif kind == "infinite":
        left[-1, 0] = math.inf
    elif kind == "tiny":
        left *= 1e-41
    elif kind == "huge":
        left *= 1e38
    elif kind == "few":  # signs of zeros, and sums that cancel
        left = left.sign() * (left.abs() > 0.8)
    return left


KINDS = ("dense", "dependent", "nearly dependent", "some zero", "nan", "infinite", "tiny", "huge", "few")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "length"), [(1, 1), (2, 300), (3, 1030), (4, 4), (7, 90)])
def test_orthonormal(rank: int, length: int, kind: str) -> None:
    given = rows_of(kind, rank, length)
    left = Guarded.of(given.view(-1))
    gpu.orthonormalise_(rows_alone(given), [left.inner.view(rank, length)])
    assert same_bytes(left.inner.view(rank, length), reference.orthonormal(given))
    assert left.intact()


def test_orthonormal_of_a_high_rank_and_of_several_steps() -> None:
    for rank, length in ((17, 70), (2, gpu_orthonormal.TILES * 1024 + 1500)):
        left = tall(rank, length)
        wanted = reference.orthonormal(left)
        gpu.orthonormalise_(rows_alone(left), [left])
        assert same_bytes(left, wanted)
        assert (wanted @ wanted.T - torch.eye(rank)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["gaussian", "minus zero", "few nonfinite", "denormal"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(530, 3, 2), (271, 130, 4), (12, 64, 10), (256, 5, 1)])
def test_back_project(rows: int, columns: int, rank: int, case: str) -> None:
    n = rows * columns - min(2, columns - 1)
    compressor = LowRank(rank, columns)
    acc, left = make(case, n, torch.float32)[0], tall(rank, rows)
    right = Guarded.of(torch.full((compressor.shape(n).rank * columns,), math.nan))
    left = left[: compressor.shape(n).rank].contiguous()
    gpu.back_project_(compressor.alone(n), [acc], [left], [right.inner.view(-1, columns)])
    assert same_bytes(right.inner.view(-1, columns), reference.back_project(compressor, acc, left))
    assert right.intact()


def test_parts_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks of rows than are on their way at the same time."""
    monkeypatch.setattr(gpu_back_project, "TOGETHER", 2)
    compressor, acc, left = LowRank(2, 2), tall(1300, 2).reshape(-1), tall(2, 1300, 1)
    right = torch.full((2, 2), math.nan)
    gpu.back_project_(compressor.alone(2600), [acc], [left], [right])
    assert same_bytes(right, reference.back_project(compressor, acc, left))


@pytest.mark.parametrize("case", ["gaussian", "minus zero", "nonfinite", "huge"])
@pytest.mark.parametrize(("n", "columns", "rank"), [(37 * 70 - 5, 70, 3), (16 * 64, 64, 9), (40, 1, 1)])
def test_settle_and_decompress(n: int, columns: int, rank: int, case: str) -> None:
    compressor = LowRank(rank, columns)
    rows, columns, rank = compressor.shape(n)
    acc = make(case, n, torch.float32)[0]
    left, right = tall(rank, rows), tall(rank, columns, 2)
    if case == "nonfinite":
        left[0, rows // 2], right[-1, columns // 3] = math.inf, math.nan
    fields = (left.view(-1), right.view(-1))
    dense = reference.decompress(compressor, fields, n)
    rest = acc - dense
    counter = torch.full((1,), 5, dtype=torch.int64)
    for nonfinite in (counter, None):
        a, e = Guarded.of(acc), Guarded.of(torch.full((n,), math.nan))
        for written in (e, a):  # what is read may be what is written
            given = [a.inner], [written.inner], [left], [right]
            gpu.settle_(compressor.alone(n), *given, nonfinite if written is a else None)
            assert same_bytes(written.inner, torch.where(rest.isfinite(), rest, 0.0))
            assert written.intact()
    assert int(counter) == 5 + int((~rest.isfinite()).sum())
    base = torch.linspace(-2, 3, n)
    for alpha in (1.0, -0.3, 1e-42):
        scaled = torch.tensor(alpha) * dense
        for accumulate, wanted in ((False, scaled), (True, base + scaled)):
            out = Guarded.of(base if accumulate else torch.full((n,), math.nan))
            gpu.decompress_(compressor, out.inner, (left, right), alpha, accumulate)
            assert same_bytes(one_nan(out.inner), one_nan(wanted))
            assert out.intact()


def test_statistics() -> None:
    compressor, n = LowRank(2, 30, decay=0.5, clip=0.4), 1030
    grad, err = make("few nonfinite", n, torch.float32)
    acc = grad + read_residual(compressor, err)
    fields, rest, _ = reference.compress(compressor, grad, err)
    body = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
    stats = torch.full((5,), math.nan, dtype=torch.float64)
    gpu.compress_(compressor, grad, err, body, None, clip=torch.tensor([0.4]), stats=stats)
    assert same_bytes(err, rest)
    assert all(map(same_bytes, compressor.layout(n).views(body[0]), fields))
    assert same_bytes(stats, statistics(acc, rest, n))


def test_launches_do_not_depend_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values and seeds, and contraction pinned off."""
    runs = []
    for case, seed in (("gaussian", 1), ("all nan", 2**63 - 1), ("all zero", -1)):
        compressor = LowRank(9, 20, seed=seed)
        grad, err = make(case, 400, torch.float32)
        body = torch.zeros(compressor.layout(400).nbytes, dtype=torch.uint8)

        def run(arguments: tuple[Any, ...] = (compressor, grad, err, body, None)) -> None:
            gpu.compress_(*arguments)
            fields = arguments[0].layout(400).views(arguments[3])
            gpu.decompress_(arguments[0], arguments[2], fields, 1.0, True)

        runs.append([(fn.__name__, grid, kwargs) for fn, grid, kwargs in recorded(monkeypatch, run)])
    assert [name for name, _, _ in runs[0]] == [
        "basis_kernel",
        "project_kernel",
        "project_kernel",
        *["gram_kernel", "orthonormal_kernel"] * 2,
        "back_project_kernel",
        "add_parts_kernel",
        "settle_kernel",
        "decompress_kernel",
    ]
    assert runs[0] == runs[1] == runs[2]
    assert all(options["enable_fp_fusion"] is False for _, _, options in runs[0])


def test_blocks_are_those_of_the_reference() -> None:
    assert gpu_back_project.ROW_BLOCK == reference.ROW_BLOCK
    assert gpu_matrix.LANES.value == reference.LANES
    assert gpu_orthonormal.LANES.value == reference.GRAM_LANES
    assert gpu_orthonormal.LEAST_LEFT.value == reference.LEAST_LEFT
