"""Statistics of what all-reduces compress: those of the oracle, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import HierarchicalGroup, SimulatedGroup, all_reduce_, all_reduce_many_
from gck.compressor import Compressor, entries_of
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import DtypeError
from gck.kernels.reference import read_residual, statistics
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile

N = 5003
COMPRESSORS: list[Any] = [
    gck.TopK(ratio=0.1),
    gck.TopK(ratio=0.1, value_bits=8, index_codec="elias_fano"),
    gck.Sign(64),
    gck.Quantize(4, 32, decay=0.9, clip=0.5),
    gck.ChunkTopK(k=5, chunk_size=64, value_bits=2),
    gck.RandomK(ratio=0.2, seed=5),
    gck.LowRank(rank=2),
]
ALGORITHMS = ["one_phase", "two_phase", "seeded", "factored", "dense", "auto"]


def gradient(rank: int, step: int, n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(n, generator=generator).to(dtype)


def runs_on(compressor: Any, algorithm: str) -> bool:
    needs = {"two_phase": compressor.shard_unit is not None, "seeded": isinstance(compressor, gck.RandomK)}
    needs["factored"] = isinstance(compressor, gck.LowRank)
    needs["one_phase"] = not needs["factored"]
    return needs.get(algorithm, True)


def test_entries() -> None:
    """Of a payload that was made, and of what knows nothing of entries."""
    for compressor in COMPRESSORS:
        for n in (1, 63, 64, 65, N):
            stats = gck.Statistics.empty()
            body = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
            if getattr(compressor, "codes", None) is None:  # which take none
                compressor.run("test", gradient(0, 0, n), torch.zeros(n), body, None, stats=stats.values)
                assert int(stats.selected) == entries_of(compressor, n)
    assert entries_of(Fragile(gck.Sign(32), fail_at=99), 70) == 70


@pytest.mark.parametrize("pieces", [0, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("compressor", "algorithm"),
    [(c, a) for c in COMPRESSORS for a in ALGORITHMS if runs_on(c, a)],
    ids=str,
)
def test_those_of_the_oracle(compressor: Any, algorithm: str, dtype: torch.dtype, pieces: int) -> None:
    world = 3

    def run(member: Any) -> tuple[list[Tensor], list[Tensor]]:
        states = [ErrorFeedback(measure=True), ErrorFeedback()]
        options: dict[str, Any] = {"algorithm": algorithm, "piece_numel": pieces}
        results = []
        for step in range(3):
            given = gradient(member.rank, step, dtype=dtype)
            before = torch.full((N,), -0.0) if states[0].worker is None else states[0].worker.clone()
            outs = [given.clone(), given.clone()]
            for out, state in zip(outs, states, strict=True):
                all_reduce_(out, state, compressor, member, **options)
            assert same_bytes(*outs)
            results.append(outs[0])
            acc = given.float() + read_residual(compressor, before)
            left = torch.zeros(N) if states[0].worker is None else states[0].worker
            if algorithm == "auto" and not left.any():
                sent = N  # it went dense
            else:
                sent = N if algorithm == "dense" else entries_of(compressor, N)
            assert states[0].statistics is not None
            assert same_bytes(states[0].statistics.values, statistics(acc, left, sent))
        assert states[1].statistics is None
        kept = [(s.worker, s.server) for s in states]
        for mine, others in zip(*kept, strict=True):
            assert (mine is None) == (others is None)
            assert mine is None or others is None or same_bytes(mine, others)
        return results, []

    SimulatedGroup(world).run(run)


def test_many_tensors_and_only_those_that_ask() -> None:
    def run(member: Any) -> None:
        states = [ErrorFeedback(measure=bool(i % 2)) for i in range(4)]
        sizes = [0, 100, 33, 4000]
        grads = [gradient(member.rank, i, n) for i, n in enumerate(sizes)]
        wanted = [grad.clone() for grad in grads]
        all_reduce_many_(grads, [*states[:3], states[3]], gck.Sign(32), member)
        for i, state in enumerate(states):
            if not i % 2:
                assert state.statistics is None
                continue
            assert state.statistics is not None
            assert float(state.statistics.acc_l1) == float(statistics(wanted[i], wanted[i], 0)[0])
        first, values = states[3].statistics, states[3].statistics.values.clone()  # type: ignore[union-attr]
        states[3].measure = False
        all_reduce_many_([gradient(member.rank, 9, 4000)], [states[3]], gck.Sign(32), member)
        assert states[3].statistics is first
        assert first is not None
        assert torch.equal(first.values, values)
        states[3].reset()
        assert states[3].statistics is None

    SimulatedGroup(2).run(run)


def test_a_part_of_a_nodes_sum() -> None:
    """On a hierarchy a rank compresses its part of what its node has summed."""
    compressor, world, local = gck.Sign(32), 4, 2

    def run(member: Any) -> tuple[int, Tensor, Tensor, int]:
        group = HierarchicalGroup.from_group(member, local_world_size=local)
        state = ErrorFeedback(measure=True)
        all_reduce_(gradient(member.rank, 0), state, compressor, group)
        assert state.statistics is not None
        assert state.worker is not None
        assert state.shard is not None
        first = state.shard.rank * gck.shard_numel(N, state.shard.unit, state.shard.world_size)
        return member.rank, state.statistics.values, state.worker, first

    for rank, values, left, first in SimulatedGroup(world).run(run):
        node = rank // local * local
        total = gradient(node, 0) + gradient(node + 1, 0)
        assert same_bytes(values, statistics(total[first : first + left.numel()], left, left.numel()))


@pytest.mark.parametrize("fail_at", [3, 4], ids=["compressing", "decoding"])
def test_a_call_that_fails_leaves_them(fail_at: int) -> None:
    member, state = SimulatedGroup(1).members[0], ErrorFeedback(measure=True)
    compressor: Compressor = Fragile(gck.Sign(32), fail_at=fail_at)
    all_reduce_(gradient(0, 0), state, compressor, member, algorithm="one_phase")
    assert state.statistics is not None
    before = state.statistics.values.clone()
    with pytest.raises(MemoryError):
        all_reduce_(gradient(0, 1), state, compressor, member, algorithm="one_phase")
    assert torch.equal(state.statistics.values, before)


@pytest.mark.parametrize("algorithm", ["one_phase", "two_phase", "dense"])
def test_in_inference_mode_and_out_of_it(algorithm: str) -> None:
    member, state = SimulatedGroup(1).members[0], ErrorFeedback(measure=True)
    state.worker_for(gradient(0, 0))
    taken = []
    for step in range(3):
        with torch.inference_mode(step == 1):
            all_reduce_(gradient(0, step), state, gck.Sign(32), member, algorithm=algorithm)
        assert state.statistics is not None
        taken.append(state.statistics.values)
    assert len({float(values[0]) for values in taken}) == 3  # each call makes its own


def test_a_residual_that_follows_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """To another device: what is sent dense is measured where it is sent from."""
    member, state = SimulatedGroup(1).members[0], ErrorFeedback(measure=True)
    state.worker = gradient(1, 1)
    followed = ErrorFeedback.worker_for

    def worker_for(self: ErrorFeedback, grad: Tensor, shard: Any = None) -> Tensor:
        if self.worker is not None and not self.worker.is_contiguous():  # as if it were elsewhere
            self.worker = self.worker.contiguous()
        return followed(self, grad, shard)

    state.worker = torch.stack([state.worker, state.worker], 1)[:, 0]
    monkeypatch.setattr(ErrorFeedback, "worker_for", worker_for)
    all_reduce_(gradient(0, 0), state, gck.Sign(32), member, algorithm="dense")
    assert state.statistics is not None
    wanted = statistics(gradient(0, 0) + gradient(1, 1), torch.zeros(N), N)
    assert same_bytes(state.statistics.values, wanted)


def test_settings_outlive_what_is_loaded() -> None:
    residuals = ErrorFeedbackMap()
    residuals["a"].measure = True
    member = SimulatedGroup(1).members[0]
    for name in "ab":
        all_reduce_(gradient(0, 0), residuals[name], gck.Sign(32), member, algorithm="one_phase")
    residuals.load_state_dict(residuals.state_dict())
    assert [residuals[name].measure for name in "ab"] == [True, False]
    assert not residuals.statistics()
    residuals.measure = True
    saved = residuals.state_dict()
    residuals.reset()
    residuals.load_state_dict(saved)
    assert [residuals[name].measure for name in "abc"] == [True] * 3
    for each in (residuals, residuals["a"], gck.ddp.HookState(gck.Sign())):
        with pytest.raises(DtypeError, match=f"^{type(each).__name__}: measure must be a bool, got 'no'"):
            each.measure = "no"  # type: ignore[assignment]


def test_a_step_that_is_skipped_leaves_those_before_it() -> None:
    member, state = SimulatedGroup(1).members[0], ErrorFeedback(measure=True)
    taken = []
    for step, spoilt in enumerate((False, True, False, True)):
        grad = gradient(0, step)
        if spoilt:
            grad[7] = torch.inf
        with gck.skip_nonfinite(state, [grad]) as guard:
            all_reduce_(grad, state, gck.Sign(32), member, algorithm="one_phase")
        assert guard.skipped == spoilt
        taken.append(state.statistics)
    assert taken[0] is taken[1]
    assert taken[2] is taken[3]
    assert taken[1] is not taken[2]


def test_a_state_that_was_pickled_before_there_were_any() -> None:
    state = ErrorFeedback()
    old = {name: value for name, value in vars(state).items() if name not in ("_measure", "statistics")}
    state.__dict__ = old
    assert not state.measure
    assert state.statistics is None


def test_entries_that_are_no_method() -> None:
    compressor: Any = Fragile(gck.Sign(32), fail_at=99)
    object.__setattr__(compressor, "entries", 12)
    assert entries_of(compressor, 70) == 70


def test_by_name() -> None:
    residuals = ErrorFeedbackMap()
    residuals["a"].measure = True
    member = SimulatedGroup(1).members[0]
    for name in "ab":
        all_reduce_(gradient(0, 0), residuals[name], gck.Sign(32), member, algorithm="one_phase")
    taken = residuals.statistics()
    assert list(taken) == ["a"]
    assert 0.6 < float(taken["a"].density()) < 0.68  # 2 / pi of a Gaussian
    assert float(taken["a"].density()) == float(taken["a"].density(N))
    assert math.isclose(float(taken["a"].left), 1 - float(taken["a"].density()), abs_tol=0.03)
    assert float(gck.Statistics.empty().left) == 0
    with pytest.raises(DtypeError, match="density: numel must be an int, got None"):
        gck.Statistics.empty().density()
    assert "statistics" not in residuals["a"].state_dict()
