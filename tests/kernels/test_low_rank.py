"""Orthonormal rows of what is nearly dependent, and bases from step to step: reference and CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gck._native import load
from gck.errors import (
    ArgumentError,
    DeviceMismatchError,
    DtypeError,
    GckError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.low_rank import LowRank, reference
from gck.kernels.low_rank.matrices import Matrices, Shape
from tests.cases import make, same_bytes
from tests.contract import check_case

U = 2.0**-24


def orthonormalise_(left: Tensor) -> None:
    rank, rows = left.shape
    Matrices(LowRank.package, [rows], [Shape(rows, 1, rank)]).orthonormalise_([left])


def next_basis(basis: Tensor, right: Tensor) -> Tensor:
    rank, columns = right.shape
    shape = Shape(rank, columns, rank)
    (following,) = Matrices(LowRank.package, [right.numel()], [shape]).next_basis([basis], [right])
    return following


def spectrum(base: float, rank: int, rows: int = 300) -> Tensor:
    """Singular values 1, 1 / base, 1 / base^2, ..., in directions of their own."""
    generator = torch.Generator().manual_seed(rank)
    outer = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64, generator=generator))[0]
    inner = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))[0]
    values = base ** -torch.arange(rank, dtype=torch.float64)
    return (inner @ torch.diag(values) @ outer.T).float()


def hilbert(rank: int, rows: int = 300) -> Tensor:
    return 1 / (torch.arange(rank)[:, None] + torch.arange(rows) + 1.0)


def kahan(rank: int) -> Tensor:
    """Rows of which none is nearly a combination of those before it, and all together are."""
    sine, cosine = math.sin(1.2), math.cos(1.2)
    matrix = torch.eye(rank, dtype=torch.float64) - cosine * torch.ones(rank, rank, dtype=torch.float64).triu(
        1
    )
    return (matrix * sine ** torch.arange(rank)[:, None]).T.contiguous().float()


HARD = {
    **{f"{base}^-i, {rank}": spectrum(base, rank) for base in (2, 5, 10, 100) for rank in (4, 8, 16, 64)},
    "hilbert": hilbert(64),
    "kahan": kahan(64),
    "powers": torch.stack([torch.linspace(-1, 1, 300) ** i for i in range(64)]),
    "nearly equal": 1 + 1e-6 * torch.randn(16, 300, generator=torch.Generator().manual_seed(1)),
    "equal": torch.ones(5, 7),
    "zero between": torch.eye(6)[[0, 1, 5, 2]] * torch.tensor([1.0, 0.0, 1e30, 1e-30])[:, None],
    "long": torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("name", HARD)
def test_rows_are_orthonormal_and_span_what_they_did(name: str) -> None:
    """To within rounding to fp32, and but for what was dropped: of each row 2^-20 of its length at most."""
    given = HARD[name]
    left = given.clone()
    orthonormalise_(left)
    assert same_bytes(left, reference.orthonormal(given))
    rows = left.double()
    rows = rows[rows.abs().amax(1) > 0]
    apart = rows @ rows.T - torch.eye(len(rows))
    assert float(torch.linalg.matrix_norm(apart, 2)) <= 2.2 * math.sqrt(len(rows)) * U
    # Of 64 rows of which each is nearly a combination of others more goes astray; residuals keep it.
    most = 2.0**-10 if name in ("hilbert", "powers") else 2.0**-20 * len(given)
    outside = given.double() - given.double() @ rows.T @ rows
    assert bool((outside.norm(dim=1) <= most * given.double().norm(dim=1)).all())


SHAPES = [
    (1, 1, 0),
    (1, 7, 0),
    (9, 1, 0),
    (3, 17, 5),
    (40, 63, 0),
    (41, 64, 1),
    (6, 130, 129),
    (300, 65, 13),
    (257, 16, 0),
    (5, 1025, 3),
    (1100, 5, 2),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 64])
def test_matrices_of_any_shape(rank: int, threads: int) -> None:
    """Rows that end within vectors and tiles, blocks and groups of rows that are not full, last rows cut."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns, lacking in SHAPES:
            compressor = LowRank(rank, columns, seed=rank - 3)
            for case, dtype in (("gaussian", torch.float32), ("nonfinite", torch.bfloat16)):
                check_case(compressor, "cpu", *make(case, rows * columns - lacking, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_rows(value: float) -> None:
    left = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    left[2, 7] = value
    wanted = reference.orthonormal(left)
    orthonormalise_(left)
    assert same_bytes(left, wanted)
    assert not bool(left.isfinite().all())


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -30, 0, 1, 100, 125, 126, 127])
def test_bases_keep_their_length(exponent: int) -> None:
    """Peaks are from 1/2 to 1, of the largest and the smallest as near as one power of two brings them."""
    compressor = LowRank(rank=2, columns=50)
    basis = compressor.basis(1000, torch.device("cpu"))
    for factor in (1.0, 1.75):
        right = torch.zeros(2, 50)
        right[0, 3], right[1, 4] = factor * 2.0**exponent, -factor * 2.0**exponent
        following = next_basis(basis, right)
        assert same_bytes(following, reference.next_basis(basis, right))
        others = following.clone()
        others[0, 3] = others[1, 4] = 0
        assert float(others.abs().max()) <= 2.0**-12
        if -149 + 23 <= exponent < 126:
            assert 0.499 < float(following[0, 3]) < 1.001
            assert -1.001 < float(following[1, 4]) < -0.499
        assert float(following.abs().max()) <= 4.001
        assert bool(following.isfinite().all())


@pytest.mark.parametrize("columns", [1, 15, 64, 1000, 40_000])
def test_bases_of_the_next_step(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    basis = torch.randn(5, columns, generator=generator)
    right = torch.randn(5, columns, generator=generator) * torch.tensor([1.0, 0.0, 1e-42, 1e38, 1.0])[:, None]
    for value in (1.0, -0.0, math.nan, math.inf, -math.inf):
        right[4, columns // 2] = value
        basis[1] = 0
        following = next_basis(basis, right)
        assert same_bytes(following, reference.next_basis(basis, right))
        assert bool(following.isfinite().all())
        assert same_bytes(following[4], basis[4]) == (not math.isfinite(value))


def test_numbers_that_are_drawn_again_are_others_each_time() -> None:
    basis, seen = torch.zeros(3, 1000), set()
    for _ in range(20):
        basis = reference.drawn_again(basis)
        assert -1 <= float(basis.min()) < -0.9
        assert 0.9 < float(basis.max()) < 1
        assert abs(float(basis.mean())) < 0.05  # of a spread of 0.58: 5 deviations of a mean of 3,000
        seen.update(row.sum().item() for row in basis)
    assert len(seen) == 60


STEPS = {
    "project_": ("grads", "errs", "bases", "accs", "lefts"),
    "orthonormalise_": ("lefts",),
    "back_project_": ("accs", "lefts", "rights"),
    "settle_": ("accs", "errs", "lefts", "rights"),
    "product_": ("outs", "lefts", "rights"),
    "next_basis": ("bases", "rights"),
}
FAULTS: dict[str, tuple[Any, type[GckError]]] = {
    "more elements": (lambda x: torch.ones(x.numel() + 1), ShapeMismatchError),
    "fewer elements": (lambda x: torch.ones(x.numel() - 1), ShapeMismatchError),
    "fp64": (lambda x: x.double(), DtypeError),
    "strided": (lambda x: torch.ones(*x.shape, 2)[..., 0], LayoutError),
    "elsewhere": (lambda x: x.to("meta"), DeviceMismatchError),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("step", "name"), [(step, name) for step in STEPS for name in STEPS[step]])
def test_steps_refuse_what_kernels_could_not_read(step: str, name: str, fault: str) -> None:
    """Of any matrix; and too few, or too many."""
    spoil, error = FAULTS[fault]
    compressors, numels = [LowRank(3, 20), LowRank(2, 7)], [615, 70]
    matrices = LowRank.together(compressors, numels)
    vectors = [torch.ones(n) for n in numels]
    lefts, rights = ([torch.ones(pair[i]) for pair in matrices.factors] for i in (0, 1))
    like = {"lefts": lefts, "rights": rights, "bases": rights}
    more = (torch.zeros(2, dtype=torch.int64),) if step == "settle_" else ()

    def call(given: dict[str, list[Tensor]]) -> None:
        before = {key: [x.clone() for x in tensors] for key, tensors in given.items()}
        with pytest.raises(error, match=f"LowRank.{step}: "):
            getattr(matrices, step)(*given.values(), *more)
        for key, tensors in given.items():
            assert all(x.is_meta or torch.equal(x, y) for x, y in zip(tensors, before[key], strict=True))

    for i in range(2):
        given = {key: [x.clone() for x in like.get(key, vectors)] for key in STEPS[step]}
        given[name][i] = spoil(given[name][i])
        call(given)
    if fault == "more elements":
        for change in (slice(1), slice(0)):
            given = {key: [x.clone() for x in like.get(key, vectors)] for key in STEPS[step]}
            given[name] = given[name][change]
            call(given)


def test_what_no_steps_are_made_of() -> None:
    for numels in ([0], [-5], [3, 0]):
        with pytest.raises(ArgumentError, match=r"LowRank.together: numels must be at least 1, got"):
            LowRank.together([LowRank()] * len(numels), numels)
    for other in (LowRank(decay=0.5), LowRank(clip=1.0)):
        with pytest.raises(ArgumentError, match=r"decay and clip must be the same"):
            LowRank.together([LowRank(), other], [10, 10])
    with pytest.raises(ValueError, match="address for each matrix"):
        load().LowRankMatrices([(10, 5, 2)]).orthonormalise([], 1)
    for shape in ((0, 5, 2), (10, 0, 2), (10, 5, 0), (10, 5, 65)):
        with pytest.raises(ValueError, match="out of range"):
            load().LowRankMatrices([shape])
    matrices = LowRank.together([LowRank(2, 5)], [20])
    tensors = [torch.ones(2, 4)], [torch.ones(2, 5)]
    for cleared in (torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.zeros(1).long().to("meta")):
        with pytest.raises(GckError, match=r"LowRank.settle_: cleared must"):
            matrices.settle_([torch.ones(20)], [torch.ones(20)], *tensors, cleared)
    negated = torch._neg_view(torch.ones(20))
    with pytest.raises(LayoutError, match="negated lazily"):
        matrices.project_([negated], [torch.ones(20)], tensors[1], [torch.ones(20)], tensors[0])


@dataclass(frozen=True)
class Half(LowRank):
    """One of somebody else."""

    def shape(self, numel: int) -> Shape:
        rows, columns, rank = super().shape(numel)
        return Shape(rows, columns, max(1, rank // 2))


def test_shapes_are_what_the_compressor_says() -> None:
    compressor, (grad, err) = Half(8, columns=30), make("gaussian", 900, torch.float32)
    fields, rest, _ = reference.compress(compressor, grad, err)
    nbytes = compressor.layout(900).nbytes
    bodies = torch.zeros(1, nbytes + 2000, dtype=torch.uint8)
    compressor.compress_(grad, err, bodies[:, :nbytes])
    assert all(map(same_bytes, compressor.layout(900).views(bodies[0, :nbytes]), fields))
    assert same_bytes(err, rest)
    assert not bool(bodies[0, nbytes:].any())
    together = LowRank.together([Half(8, 30), LowRank(8, 30)], [900, 900])
    assert together.factors == [((4, 30), (4, 30)), ((8, 30), (8, 30))]
