"""What the compressed all-reduces promise as algorithms: nothing is lost, and optimisation converges.

Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (ICML
2019); Tang et al., "DoubleSqueeze" (ICML 2019), for residuals at workers and servers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.collectives import SimulatedGroup
from gck.collectives.transports.simulated import SimulatedMember
from tests.collectives import oracle

U = 2.0**-24  # the relative error of one rounding to fp32

COMPRESSORS = [
    gck.TopK(ratio=0.05),
    gck.ChunkTopK(k=4, chunk_size=32, value_bits=32),
    gck.ChunkTopK(k=4, chunk_size=32, value_bits=2),
    gck.Sign(chunk_size=32),
    gck.Quantize(bits=8, chunk_size=32),
    gck.Quantize(bits=4, chunk_size=32),
    gck.Quantize(bits=2, chunk_size=32),
    gck.Quantize(bits=2, chunk_size=32, scale="mean"),
]


# Right on average, without a residual too, for a seed of its own at every step.
AT_RANDOM = [
    gck.RandomK(ratio=0.2, seed=0),
    gck.Quantize(bits=4, chunk_size=32, rounding="stochastic", seed=0),
]


def algorithm_of(compressor: Any) -> str:
    return "one_phase" if compressor.shard_unit is None else "two_phase"


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_alone_it_is_plain_error_feedback(compressor: Any) -> None:
    """One rank: what comes back is what its own message says. In two phases the message is compressed again,
    with a residual of its own."""
    n, state, member = 200, gck.ErrorFeedback(), SimulatedGroup(1).members[0]
    err, server_err = torch.zeros(n), torch.zeros(n)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        grad = torch.randn(n, generator=generator)
        expected, err = message(compressor, grad, err)
        if compressor.shard_unit is not None:
            expected, server_err = message(compressor, expected, server_err)
        got = gck.all_reduce_(grad, state, compressor, member, algorithm=algorithm_of(compressor))
        assert torch.equal(got, expected)
        assert state.worker is not None
        assert torch.equal(state.worker, err)


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.shard_unit is not None], ids=str)
def test_two_phases_of_one_rank_are_plain_error_feedback(compressor: Any) -> None:
    """What is compressed again is what a message says already: bit by bit, but where levels are means, whose
    mean rounds once more."""
    n, state, member = 200, gck.ErrorFeedback(), SimulatedGroup(1).members[0]
    err, generator = torch.zeros(n), torch.Generator().manual_seed(3)
    for _ in range(5):
        grad = torch.randn(n, generator=generator)
        expected, err = message(compressor, grad, err)
        got = gck.all_reduce_(grad, state, compressor, member, algorithm="two_phase")
        if compressor == gck.Quantize(bits=2, chunk_size=32, scale="mean"):
            assert bool(((got - expected).abs() <= 32 * U * expected.abs()).all())
        else:
            assert torch.equal(got, expected)


def message(compressor: Any, grad: Tensor, err: Tensor) -> tuple[Tensor, Tensor]:
    reference = oracle.reference(compressor)
    fields, residual, _ = reference.compress(compressor, grad, err)
    return reference.decompress(compressor, fields, grad.numel()), residual


@pytest.mark.parametrize("world_size", [3, 8])
@pytest.mark.parametrize("compressor", COMPRESSORS + AT_RANDOM, ids=str)
def test_nothing_is_lost(compressor: Any, world_size: int) -> None:
    """sum of averages + the mean of worker residuals + the server residual = mean of all gradients.

    Up to roundings, each at most U times what it makes. A worker rounds acc and err. The owner adds W
    messages, each at most |acc| + |err| of its worker, by W roundings at most, divides, and rounds its acc,
    which is at most |result| + |err|, and err.
    """
    n, steps = 200, 50
    states = [gck.ErrorFeedback() for _ in range(world_size)]
    generators = [torch.Generator().manual_seed(100 + rank) for rank in range(world_size)]
    grads = [[torch.randn(n, generator=g) for _ in range(steps)] for g in generators]
    valid = [0] * world_size
    if compressor.shard_unit is not None:
        valid = oracle.valid_numels(n, compressor.shard_unit, world_size)

    def train(member: SimulatedMember) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each step, the result, |acc| + |err| of the worker, and |err| of the server."""
        state, log = states[member.rank], []
        for grad in grads[member.rank]:
            acc = grad if state.worker is None else grad + state.worker
            result = grad.clone()
            gck.all_reduce_(result, state, compressor, member, algorithm=algorithm_of(compressor))
            assert state.worker is not None
            server = torch.zeros(0) if state.server is None else state.server[: valid[member.rank]]
            log.append((result.double(), (acc.abs() + state.worker.abs()).double(), server.abs().double()))
        return log

    logs = SimulatedGroup(world_size).run(train)
    given = sum(sum(g.double() for g in of_rank) for of_rank in grads) / world_size
    kept = sum(state.worker.double() for state in states if state.worker is not None) / world_size
    if any(valid):
        servers = [s.server[:v] for s, v in zip(states, valid, strict=True) if s.server is not None]
        kept = kept + torch.cat(servers).double()
    sent, slack = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in zip(*logs, strict=True):
        results, sizes, servers = zip(*step, strict=True)
        assert all(torch.equal(result, results[0]) for result in results)
        sent += results[0]
        slack += (world_size + 3) * U * sum(sizes) / world_size
        if any(valid):
            slack += U * (results[0].abs() + 2 * torch.cat(servers))
    assert bool(((sent + kept - given).abs() <= slack).all())
    assert float(slack.max()) < 1e-2  # or the bound would say nothing


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_sgd_converges_by_error_feedback_alone(compressor: Any) -> None:
    with_memory, without = distances(compressor, 8)
    assert with_memory < 0.05
    assert without > 4 * with_memory


@pytest.mark.parametrize("compressor", COMPRESSORS[::3], ids=str)  # of what is sparse, of signs and of codes
def test_without_memory_sgd_stands_still(compressor: Any) -> None:
    """However near the optimum that is: three times as many steps bring it nearer by memory alone."""
    with_memory, with_memory_later = distances_after((300, 900), compressor, 4)
    without, without_later = distances_after((300, 900), compressor, 4, memory=False)
    assert with_memory < 0.05
    assert without > 4 * with_memory
    assert with_memory_later < 0.7 * with_memory
    assert without_later > 0.8 * without


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("compressor", AT_RANDOM, ids=str)
def test_sgd_at_random_converges_in_any_case_and_farther_by_error_feedback(
    compressor: Any, world_size: int
) -> None:
    """Entries that all ranks choose alike are coordinate descent; what is rounded at random is right on
    average."""
    with_memory, without = distances(compressor, world_size)
    assert with_memory < 0.01
    assert with_memory < without < 0.05


@pytest.mark.parametrize("world_size", [4, 8])
def test_two_bits_at_random_want_no_residual(world_size: int) -> None:
    """At steps that do not shrink: what docs/kernels/quantize.md warns of."""
    random = gck.Quantize(bits=2, chunk_size=32, rounding="stochastic", seed=0)
    with_memory, without = distances(random, world_size, decay=0)
    assert with_memory > 1e6
    assert without < 0.5
    for scale in ("max", "mean"):
        nearest = gck.Quantize(bits=2, chunk_size=32, scale=scale)
        assert distances_after((300,), nearest, world_size, decay=0)[0] < 0.5


def distances(compressor: Any, world_size: int, decay: float = 0.1) -> tuple[float, float]:
    """From the optimum after 300 steps, with residuals and without."""
    (with_memory,) = distances_after((300,), compressor, world_size, decay)
    (without,) = distances_after((300,), compressor, world_size, decay, memory=False)
    return with_memory, without


def distances_after(
    steps: tuple[int, ...], compressor: Any, world_size: int, decay: float = 0.1, *, memory: bool = True
) -> list[float]:
    """From the optimum. Least squares whose ranks disagree: f_r(x) = |x - b_r|^2 / 2 has gradients that do
    not vanish at the common optimum, the mean of the b_r, but cancel there, which they do not in messages
    without memory."""
    n = 96
    targets = torch.randn(world_size, n, generator=torch.Generator().manual_seed(world_size))
    optimum = targets.double().mean(0)

    def train(member: SimulatedMember) -> list[Tensor]:
        x, target, seen = torch.zeros(n), targets[member.rank], []
        state = gck.ErrorFeedback() if memory else None
        for step in range(steps[-1]):
            grad, now = x - target, compressor
            if hasattr(compressor, "seed"):
                now = replace(compressor, seed=step)
            algorithm = algorithm_of(compressor)
            gck.all_reduce_(grad, state, now, member, algorithm=algorithm, validate="off")
            x -= 0.2 / (1 + step * decay) * grad
            if step + 1 in steps:
                seen.append(x.clone())
        return seen

    found = SimulatedGroup(world_size).run(train)
    assert all(torch.equal(x, y) for seen in found for x, y in zip(seen, found[0], strict=True))
    return [float((x.double() - optimum).norm() / optimum.norm()) for x in found[0]]
