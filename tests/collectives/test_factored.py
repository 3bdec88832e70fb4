"""Two all-reduces of factors: the bits of the oracle, power iterations, residuals of one's own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import (
    HierarchicalGroup,
    SimulatedGroup,
    all_reduce_cost,
    all_reduce_many_,
    choose_algorithm,
    hierarchical_cost,
)
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    DtypeError,
    LayoutError,
)
from gck.kernels.low_rank import LowRank
from gck.kernels.low_rank.matrices import Matrices
from tests.cases import same_bytes
from tests.collectives import oracle
from tests.collectives.grid import on_grid

SHAPES = [(40, 30), (7, 5, 11), (300, 70), (3, 200), (1000,), (1,), (0,), (5, 0), (1, 9)]


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_bits_of_the_oracle(world_size: int, op: str) -> None:
    compressor = LowRank(rank=3, seed=7)

    def rank_main(member: Any) -> list[Any]:
        states = [gck.ErrorFeedback() for _ in SHAPES]
        steps = []
        for step in range(3):
            grads = gradients(member.rank, step, torch.bfloat16 if step == 1 else torch.float32)
            all_reduce_many_(grads, states, compressor, member, op, "factored")
            kept = [(None if s.worker is None else s.worker.clone(), s.basis) for s in states]
            steps.append((grads, kept))
        return steps

    ranks = SimulatedGroup(world_size).run(rank_main)
    for i, shape in enumerate(SHAPES):
        bound, n = compressor.for_shape(shape), torch.Size(shape).numel()
        errs, basis = [torch.zeros(n)] * world_size, None
        for step in range(3):
            dtype = torch.bfloat16 if step == 1 else torch.float32
            grads = [gradients(rank, step, dtype)[i] for rank in range(world_size)]
            if not n:
                continue
            result, errs, basis = oracle.factored(bound, grads, errs, basis, op)
            for rank in range(world_size):
                got, (worker, kept) = ranks[rank][step][0][i], ranks[rank][step][1][i]
                assert same_bytes(got.view(-1), result.to(dtype))
                assert same_bytes(worker, errs[rank])
                assert same_bytes(kept, basis)


@pytest.mark.parametrize("local", [1, 2, 4])
def test_nodes_share_matrices_by_rows(local: int) -> None:
    """Each rank of a node reduces some whole rows of the node's sum, with a basis of its own."""
    compressor, shape = LowRank(rank=2, seed=1), (37, 20)

    def rank_main(member: Any) -> tuple[Tensor, Any]:
        group = HierarchicalGroup.from_group(member, local_world_size=local)
        state = gck.ErrorFeedback()
        for step in range(2):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(10 * member.rank + step))
            gck.all_reduce_(grad, state, compressor, group, algorithm="factored")
        return grad, state.worker

    ranks = SimulatedGroup(4).run(rank_main)
    errs: list[list[Tensor]] = [[torch.zeros(0)]] * local
    bases: list[Tensor | None] = [None] * local
    bound = compressor.for_shape(shape)
    for step in range(2):
        grads = [
            torch.randn(shape, generator=torch.Generator().manual_seed(10 * rank + step)) for rank in range(4)
        ]
        parts = []
        for part, sums in enumerate(oracle.node_sums(grads, local, bound.columns)):
            old = errs[part] if step else [torch.zeros_like(each) for each in sums]
            result, errs[part], bases[part] = oracle.factored(bound, sums, old, bases[part], "avg", 4)
            parts.append(result)
    for rank, (grad, worker) in enumerate(ranks):
        assert same_bytes(grad.view(-1), torch.cat(parts))
        assert same_bytes(worker, errs[rank % local][rank // local])


def test_nodes_share_what_is_not_compressed_by_elements() -> None:
    """Few long rows would be one rank's alone, and shards of them as long."""
    compressor = LowRank(rank=4)
    for shape in ((1, 197, 768), (2, 4096), (3, 70)):
        n, bound = torch.Size(shape).numel(), compressor.for_shape(shape)

        def rank_main(group: HierarchicalGroup, shape: tuple[int, ...] = shape) -> Tensor:
            state = gck.ErrorFeedback()
            grad = torch.full(shape, 1.0 + group.rank)
            gck.all_reduce_(grad, state, compressor, group)
            assert state.basis is None
            return grad

        for grad in on_grid((2, 4), rank_main):
            assert bool((grad == 4.5).all())
        cost = hierarchical_cost(bound, [n], 2, 4)
        assert cost.cross.algorithm == "dense"
        assert cost.local.nbytes == 2 * 3 * math.ceil(n / 16) * 16
    rows = hierarchical_cost(compressor.for_shape((100, 64)), [6400], 2, 4)
    assert rows.cross.algorithm == "factored"
    assert rows.local.nbytes == 2 * 3 * 25 * 64 * 4


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (1, 2)])
def test_rows_that_some_ranks_of_a_node_lack(grid: tuple[int, int]) -> None:
    """Also longer ones than there are elements, as where one length is given for all tensors."""

    def rank_main(group: HierarchicalGroup) -> list[Tensor]:
        grads = [torch.full(shape, 1.0 + group.rank) for shape in ((2, 20), (1, 9), (10,), (0, 3))]
        states = [gck.ErrorFeedback() for _ in grads]
        all_reduce_many_(grads, states, LowRank(rank=2, columns=10**9), group, algorithm="factored")
        all_reduce_many_(grads, [None] * 4, LowRank(rank=2), group, algorithm="factored")
        return grads

    mean = (1 + grid[0] * grid[1]) / 2
    for grads in on_grid(grid, rank_main):
        for grad in grads:
            assert torch.allclose(grad, torch.full(grad.shape, mean), rtol=1e-5)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"clip": 0.25}, {"decay": 0.5, "clip": 0.5}], ids=str)
def test_residuals_are_read_as_options_say(options: dict[str, Any]) -> None:
    compressor = LowRank(rank=2, columns=20, **options)

    def rank_main(member: Any) -> list[tuple[Tensor, Tensor]]:
        state, steps = gck.ErrorFeedback(), []
        for step in range(3):
            grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(10 * member.rank + step))
            gck.all_reduce_(grad, state, compressor, member, algorithm="factored")
            assert state.worker is not None
            steps.append((grad.view(-1), state.worker.clone()))
        return steps

    ranks = SimulatedGroup(2).run(rank_main)
    errs, basis = [torch.zeros(600)] * 2, None
    for step in range(3):
        grads = [
            torch.randn(30, 20, generator=torch.Generator().manual_seed(10 * r + step)) for r in range(2)
        ]
        result, errs, basis = oracle.factored(compressor, grads, errs, basis, "avg")
        for rank in range(2):
            assert same_bytes(ranks[rank][step][0], result)
            assert same_bytes(ranks[rank][step][1], errs[rank])


@pytest.mark.parametrize("rank", [1, 4])
def test_a_basis_sees_everything_in_the_end(rank: int) -> None:
    """Gradients move to rows and columns that the first ones had nothing in, or a basis was nothing."""

    def rank_main(member: Any) -> float:
        state, sent, given = gck.ErrorFeedback(), torch.zeros(64, 64), torch.zeros(64, 64)
        for step in range(30):
            grad, generator = torch.zeros(64, 64), torch.Generator().manual_seed(7)
            half = slice(32) if step == 0 else slice(32, None)
            grad[half, half] = torch.randn(32, 1, generator=generator) @ torch.randn(
                1, 32, generator=generator
            )
            if step == 10 and member.rank:
                state.basis = torch.zeros(rank, 64)
            if step:
                given += grad
            result = gck.all_reduce_(grad, state, LowRank(rank=rank), member, algorithm="factored")
            sent[32:, 32:] += result[32:, 32:]
        assert state.worker is not None
        assert float(state.worker.norm()) < 1e-3 * float(given.norm())
        return float((sent - given).norm() / given.norm())

    assert all(left < 1e-3 for left in SimulatedGroup(2).run(rank_main))


def test_residuals_and_bases_of_somebody_else() -> None:
    """What kernels could not read is refused before anything is written; a basis is replaced."""
    member, memory = SimulatedGroup(1).members[0], torch.zeros(3 * 600, dtype=torch.float64)
    grad, copy = torch.randn(30, 20), torch.zeros(30, 20)
    copy.copy_(grad)
    for worker in (memory[:600], memory.float()[:1200:2], memory.half()[:600], torch.zeros(1200)[::2]):
        state = gck.ErrorFeedback()
        state.worker = worker
        with pytest.raises((DtypeError, LayoutError), match=r"LowRank.project_: err must be"):
            gck.all_reduce_(grad, state, LowRank(), member, algorithm="factored")
        assert same_bytes(grad, copy)
    freed = torch.ones(4, 20)
    freed.untyped_storage().resize_(0)
    for basis in (
        torch.ones(4, 20).double(),
        torch.ones(4, 20).half(),
        torch.ones(20, 4).t(),
        "x",
        torch.ones(5),
        torch.ones(4, 20).to_sparse(),
        freed,
    ):
        state = gck.ErrorFeedback()
        state.basis = basis  # type: ignore[assignment]
        gck.all_reduce_(grad.clone(), state, LowRank(), member, algorithm="factored")
        assert isinstance(state.basis, Tensor)
        assert state.basis.dtype == torch.float32
        assert tuple(state.basis.shape) == (4, 20)
    assert LowRank().for_shape((1, 2**31)).columns == 2**31 - 1


def test_the_same_matrix_again_and_again_is_sent_whole() -> None:
    """A power iteration: of what the first steps leave, later ones have the largest part again, until nothing
    is left. A basis drawn anew at each step would be at it for longer."""
    matrix = torch.randn(64, 6) @ torch.randn(6, 48)

    def rank_main(member: Any) -> list[float]:
        state, left = gck.ErrorFeedback(), []
        for step in range(8):
            grad = matrix.clone() if step == 0 else torch.zeros(64, 48)
            gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm="factored")
            assert state.worker is not None
            left.append(float(state.worker.norm() / matrix.norm()))
        return left

    torch.manual_seed(3)
    for left in SimulatedGroup(3).run(rank_main):
        assert all(later <= earlier for earlier, later in pairwise(left))
        assert left[-1] < 1e-5


def test_residuals_of_unlike_ranks_stay_bounded() -> None:
    """Each rank has a gradient of its own at every step, whose mean is zero, and a little noise. One that
    took the average from its own would keep nearly all of it, at every step."""
    steps = 300

    def rank_main(member: Any) -> tuple[list[float], float]:
        own = torch.randn(32, 24, generator=torch.Generator().manual_seed(1)) * (1 if member.rank else -1)
        noise, state, norms = torch.Generator().manual_seed(2 + member.rank), gck.ErrorFeedback(), []
        by_average = torch.zeros(32, 24)
        for _ in range(steps):
            grad = own + 0.1 * torch.randn(32, 24, generator=noise)
            result = gck.all_reduce_(grad.clone(), state, LowRank(rank=4), member, algorithm="factored")
            assert state.worker is not None
            norms.append(float(state.worker.norm() / own.norm()))
            by_average += grad - result
        return norms, float(by_average.norm() / own.norm())

    for norms, by_average in SimulatedGroup(2).run(rank_main):
        assert max(norms[steps // 2 :]) < 1.2 * max(norms[: steps // 2])
        assert max(norms) < by_average / 10


def test_ranks_with_other_bases_have_the_same_result() -> None:
    """As where some have resumed from a checkpoint and others start anew."""

    def rank_main(member: Any) -> Tensor:
        state = gck.ErrorFeedback()
        if member.rank == 1:
            state.basis = torch.randn(2, 20)
        grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(member.rank))
        return gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm="factored")

    first, *others = SimulatedGroup(3).run(rank_main)
    assert all(same_bytes(first, other) for other in others)
    assert float(first.norm()) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives_and_does_not_stay(value: float) -> None:
    def rank_main(member: Any) -> tuple[Tensor, Tensor, int, Any, Any]:
        state = gck.ErrorFeedback()
        gck.all_reduce_(torch.randn(30, 20), state, LowRank(rank=2), member, algorithm="factored")
        before = state.basis
        grad = torch.randn(30, 20)
        if member.rank == 1:
            grad[3, 4] = value
        gck.all_reduce_(grad, state, LowRank(rank=2), member, algorithm="factored")
        assert state.worker is not None
        assert state.nonfinite is not None
        return grad, state.worker, int(state.nonfinite), before, state.basis

    for grad, worker, count, before, after in SimulatedGroup(3).run(rank_main):
        assert not bool(grad.isfinite().all())
        assert bool(worker.isfinite().all())
        assert count > 0
        assert same_bytes(before, after)  # from which the next step can start


def test_without_a_state_nothing_is_kept() -> None:
    def rank_main(member: Any) -> Tensor:
        grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(member.rank))
        return gck.all_reduce_(grad, None, LowRank(rank=2), member, algorithm="factored")

    grads = [torch.randn(30, 20, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    bound = LowRank(rank=2).for_shape((30, 20))
    wanted, _, _ = oracle.factored(bound, grads, [torch.full((600,), -0.0)] * 2, None, "avg")
    for result in SimulatedGroup(2).run(rank_main):
        assert same_bytes(result.view(-1), wanted)


@pytest.mark.parametrize("step", ["project_", "orthonormalise_", "back_project_", "next_basis"])
def test_after_a_failure_everything_is_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    member, state, compressor = SimulatedGroup(1).members[0], gck.ErrorFeedback(), LowRank(rank=2)
    gck.all_reduce_(torch.randn(30, 20), state, compressor, member, algorithm="factored")
    assert state.worker is not None
    assert state.basis is not None
    worker, basis, grad = state.worker.clone(), state.basis.clone(), torch.randn(30, 20)
    copy, works = grad.clone(), getattr(Matrices, step)

    def failing(*args: Any, **options: Any) -> None:
        works(*args, **options)
        raise MemoryError

    monkeypatch.setattr(Matrices, step, failing)
    with pytest.raises(MemoryError):
        gck.all_reduce_(grad, state, compressor, member, algorithm="factored")
    assert same_bytes(grad, copy)
    assert same_bytes(state.worker, worker)
    assert same_bytes(state.basis, basis)
    fresh = gck.ErrorFeedback()
    with pytest.raises(MemoryError):
        gck.all_reduce_(grad, fresh, compressor, member, algorithm="factored")
    assert fresh.worker is None
    assert fresh.basis is None


def test_ranks_that_see_another_matrix_are_told() -> None:
    def rank_main(member: Any) -> None:
        grad = torch.randn((30, 20) if member.rank else (20, 30))
        with pytest.raises(CollectiveMismatchError, match=r"shapes or names.*in rows of"):
            gck.all_reduce_(grad, None, LowRank(rank=2), member, algorithm="factored")
        gck.all_reduce_(torch.randn(30, 20), None, LowRank(rank=2), member, algorithm="factored")

    SimulatedGroup(2).run(rank_main)


def test_auto_compresses_where_it_pays() -> None:
    assert choose_algorithm(LowRank(rank=4).for_shape((512, 512)), [512 * 512], 4) == "factored"
    assert choose_algorithm(LowRank(rank=4).for_shape((4, 512)), [4 * 512], 4) == "dense"
    assert choose_algorithm(LowRank(rank=4).for_shape((512, 512)), [512 * 512], 1) == "dense"
    few, many = (all_reduce_cost(LowRank(rank=4, columns=512), [512 * 512], w, "factored") for w in (4, 64))
    assert few.nbytes < many.nbytes < 1.5 * few.nbytes
    assert all_reduce_cost(LowRank(rank=4, columns=512), [512 * 512], 4).nbytes == few.nbytes

    def rank_main(member: Any) -> tuple[Any, Any]:
        states = [gck.ErrorFeedback(), gck.ErrorFeedback()]
        all_reduce_many_([torch.randn(512, 512), torch.randn(4, 512)], states, LowRank(), member)
        return states[0].basis, states[1].worker

    for basis, worker in SimulatedGroup(2).run(rank_main):
        assert tuple(basis.shape) == (4, 512)
        assert worker is None


def test_it_is_for_two_factors_alone_and_takes_no_other() -> None:
    member = SimulatedGroup(1).members[0]
    with pytest.raises(ArgumentError, match='"factored" needs a compressor of two factors'):
        gck.all_reduce_(torch.ones(64), None, gck.Sign(), member, algorithm="factored")
    with pytest.raises(ArgumentError, match='"one_phase" gathers payloads of vectors'):
        gck.all_reduce_(torch.ones(64), None, LowRank(), member, algorithm="one_phase")
    for algorithm in ("one_phase", "two_phase", "seeded"):
        with pytest.raises(ArgumentError, match="not for"):
            all_reduce_cost(LowRank(), [64], 2, algorithm)
    with pytest.raises(ArgumentError, match="not for"):
        all_reduce_cost(gck.Sign(), [64], 2, "factored")
