"""Two tiers on simulated ranks: the bytes of the oracle, what is kept, and what is sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck import HierarchicalGroup
from gck.collectives import (
    SimulatedGroup,
    Transport,
    all_reduce_,
    all_reduce_cost,
    all_reduce_many_,
    hierarchical_cost,
    sparse_all_gather,
)
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    ArgumentError,
    StateMismatchError,
)
from tests.cases import same_bytes
from tests.collectives import oracle
from tests.collectives.grid import gradient, on_grid

U = 2.0**-24  # the relative error of one rounding to fp32
GRIDS = [(2, 2), (2, 3), (3, 2), (4, 1), (1, 4)]  # nodes, ranks of a node
COMPRESSORS = [
    gck.TopK(ratio=0.1),
    gck.RandomK(ratio=0.2, seed=5),
    gck.Sign(32),
    gck.ChunkTopK(k=5, chunk_size=32, value_bits=2),
    gck.Quantize(8, 32, "stochastic", seed=7),
]


def algorithms_of(compressor: Any) -> list[str]:
    return ["one_phase"] if compressor.shard_unit is None else ["one_phase", "two_phase"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("compressor", "algorithm"), [(c, a) for c in COMPRESSORS for a in algorithms_of(c)], ids=str
)
def test_equals_oracle(compressor: Any, algorithm: str, dtype: torch.dtype) -> None:
    """Results and both residuals of two steps, by their bytes."""
    sizes = (0, 1, 3, 257, 1001)

    for nodes, local in GRIDS:
        world_size = nodes * local

        def train(group: HierarchicalGroup) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
            assert isinstance(group, Transport)
            found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
            for n, op in itertools.product(sizes, ("sum", "avg")):
                state = ErrorFeedback()
                for step in range(2):
                    grad = gradient(group.rank, step, n, dtype)
                    assert all_reduce_(grad, state, compressor, group, op, algorithm) is grad
                    kept = (state.worker, state.server)
                    found.append((grad, *(None if t is None else t.clone() for t in kept)))
            return found

        results = iter(zip(*on_grid((nodes, local), train), strict=True))
        for n, op in itertools.product(sizes, ("sum", "avg")):
            unit = compressor.shard_unit
            valid = oracle.valid_numels(n, unit or 1, local)
            errs = [[torch.zeros(v)] * nodes for v in valid]
            parts_of = [oracle.valid_numels(v, unit or 1, nodes) for v in valid]
            servers = [[torch.zeros(v) for v in parts] for parts in parts_of]
            for step in range(2):
                grads = [gradient(rank, step, n, dtype) for rank in range(world_size)]
                parts = []
                for i, sums in enumerate(oracle.node_sums(grads, local, unit)):
                    if algorithm == "two_phase":
                        part, errs[i], servers[i] = oracle.two_phase(
                            compressor, sums, errs[i], servers[i], op, world_size
                        )
                    else:
                        part, errs[i] = oracle.one_phase(compressor, sums, errs[i], op, world_size)
                    parts.append(part)
                expected = torch.cat(parts).to(dtype)
                for rank, (grad, worker, server) in enumerate(next(results)):
                    node, i = divmod(rank, local)
                    assert oracle.same(grad, expected), f"{nodes} x {local}, {op}, {n} elements, rank {rank}"
                    assert worker is None if not valid[i] else oracle.same(worker, errs[i][node])
                    if server is not None:
                        assert oracle.same(server[: parts_of[i][node]], servers[i][node])


@pytest.mark.parametrize(
    ("compressor", "algorithm"),
    [(gck.TopK(ratio=1.0), "one_phase"), (gck.ChunkTopK(16, 32, value_bits=32), "two_phase")],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_flat_where_nothing_is_left_out(
    compressor: Any, algorithm: str, grid: tuple[int, int]
) -> None:
    """Small integers, half of each chunk zero: all sums are exact, and every message is complete."""
    n = 500
    places = torch.arange(n) % 2 == 0

    def grad_of(rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(-99, 100, (n,), generator=generator).float() * places

    def reduce(group: Any) -> Tensor:
        return all_reduce_(grad_of(group.rank), ErrorFeedback(), compressor, group, algorithm=algorithm)

    flat = SimulatedGroup(grid[0] * grid[1], timeout=60).run(reduce)[0]
    assert flat.any()
    for result in on_grid(grid, reduce):
        assert same_bytes(result, flat)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_nothing_is_lost_and_flat_is_within_the_residuals(compressor: Any, grid: tuple[int, int]) -> None:
    """sum of averages + node residuals / W + server residuals = mean of all gradients, in any topology, so
    that two topologies differ by their residuals at most.

    Up to roundings, each at most U times what it makes. A rank adds L gradients by L roundings of at most the
    sum of their magnitudes, and rounds acc and err. The owner adds N messages, each at most |acc| + |err| of
    its worker, by N roundings at most, divides, and rounds acc, which is at most |result| + |err|, and err.
    """
    n, steps, (nodes, local) = 200, 12, grid
    world_size = nodes * local
    grads = [[gradient(rank, step, n) for step in range(steps)] for rank in range(world_size)]
    algorithm = algorithms_of(compressor)[-1]
    given = sum(sum(g.double() for g in of_rank) for of_rank in grads) / world_size
    magnitudes = sum(sum(g.double().abs() for g in of_rank) for of_rank in grads) / world_size

    def train(group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum of results; what this rank keeps, in their units; the slack of its roundings."""
        inside, across = (group.local, group.cross) if isinstance(group, HierarchicalGroup) else (None, group)
        state, sent = ErrorFeedback(), torch.zeros(n, dtype=torch.float64)
        kept, slack = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        start, part = 0, n
        if inside is not None:
            valid = oracle.valid_numels(n, compressor.shard_unit or 1, inside.world_size)
            start, part = sum(valid[: inside.rank]), valid[inside.rank]
        mine = slice(start, start + part)
        for step in range(steps):
            before = torch.zeros(part) if state.worker is None else state.worker.clone()
            result = grads[group.rank][step].clone()
            all_reduce_(result, state, compressor, group, algorithm=algorithm)
            sent += result
            if state.worker is None:
                continue
            first = group.rank - (0 if inside is None else inside.rank)
            members = range(first, first + (1 if inside is None else inside.world_size))
            total = sum(grads[rank][step][mine] for rank in members)
            sizes = (total + before).abs() + state.worker.abs()
            slack[mine] += (across.world_size + 4) * U * sizes.double() / world_size
            if state.server is not None:
                owned = oracle.valid_numels(part, compressor.shard_unit, across.world_size)
                begin = start + sum(owned[: across.rank])
                own = slice(begin, begin + owned[across.rank])
                server = state.server[: owned[across.rank]].double()
                slack[own] += U * (result[own].abs() + 3 * server.abs())
                if step == steps - 1:
                    kept[own] += server
        if state.worker is not None:
            kept[mine] += state.worker.double() / world_size
        return sent, kept, slack, kept.abs()

    topologies = {
        "flat": SimulatedGroup(world_size, timeout=60).run(train),
        "tiers": on_grid(grid, train),
    }
    found = {}
    for name, ranks in topologies.items():
        sent = ranks[0][0]
        assert all(torch.equal(sent, other[0]) for other in ranks)
        kept, slack, most = (sum(rank[i] for rank in ranks) for i in (1, 2, 3))
        slack = slack + (local if name == "tiers" else 1) * U * magnitudes
        assert bool(((sent + kept - given).abs() <= slack).all()), name
        assert float(slack.max()) < 1e-2  # or the bound would say nothing
        found[name] = (sent, most, slack)
    bound = sum(most + slack for _, most, slack in found.values())
    assert bool(((found["flat"][0] - found["tiers"][0]).abs() <= bound).all())


def test_many_tensors_share_messages_and_keep_their_bits() -> None:
    numels, compressor = (1000, 0, 3, 257, 100_000), gck.Sign(256)

    def many(group: HierarchicalGroup) -> tuple[list[Tensor], list[Tensor]]:
        together = [gradient(group.rank, i, n) for i, n in enumerate(numels)]
        apart = [grad.clone() for grad in together]
        before = len(group.local._tickets), len(group.cross._tickets)  # type: ignore[attr-defined]
        all_reduce_many_(together, [ErrorFeedback() for _ in numels], compressor, group, validate="off")
        after = len(group.local._tickets), len(group.cross._tickets)  # type: ignore[attr-defined]
        # Inside, a message each way; across, of the dense tensors one, and of the compressed two.
        assert (after[0] - before[0], after[1] - before[1]) == (2, 3)
        for grad in apart:
            all_reduce_(grad, ErrorFeedback(), compressor, group)
        return together, apart

    for together, apart in on_grid((3, 2), many):
        assert all(same_bytes(a, b) for a, b in zip(together, apart, strict=True))


def test_it_is_a_transport() -> None:
    """What the ranks of a flat group would get of the same calls."""

    def calls(group: Transport) -> list[Tensor]:
        rank, world_size = group.rank, group.world_size
        send = torch.arange(3 * world_size, dtype=torch.uint8).view(world_size, 3) + 100 * rank
        total = torch.arange(7.0) * (rank + 1)
        group.all_reduce(total)
        group.barrier()
        group.synchronize()
        payload = gck.topk(gradient(rank, 0, 50), 0.1)
        gathered = sparse_all_gather(payload, group)
        rows = group.all_gather_bytes(send.view(-1))
        return [rows, group.all_to_all_bytes(send), total, *(p.values for p in gathered)]

    for nodes, local in GRIDS:
        flat = SimulatedGroup(nodes * local, timeout=60).run(calls)
        tiers = on_grid((nodes, local), calls)
        for mine, theirs in zip(tiers, flat, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def rest(group: HierarchicalGroup) -> None:
        assert repr(group) == f"<HierarchicalGroup rank {group.rank} of 2 nodes of 3>"
        shorter = group.with_timeout(5)
        assert (group.timeout, shorter.timeout, shorter.cross.timeout) == (60, 5, 5)
        assert shorter.calls is group.calls
        with pytest.raises(ArgumentError, match="send must have 6 rows, got"):
            group.all_to_all_bytes(torch.zeros(5, 1, dtype=torch.uint8))

    on_grid((2, 3), rest)


def test_dense_sends_and_clears_all_residuals() -> None:
    # Small integers: every sum is exact, so that the order of additions does not matter.
    n, unit = 150, 32

    def train(group: HierarchicalGroup) -> Tensor:
        state = ErrorFeedback()
        all_reduce_(torch.zeros(n), state, gck.Sign(unit), group, algorithm="two_phase")
        assert state.worker is not None
        assert state.server is not None
        state.worker.fill_(4 * (group.cross.rank + 1))
        state.server.fill_(8 * (group.rank + 1))
        grad = torch.full((n,), 4.0)
        all_reduce_(grad, state, gck.Sign(unit), group, algorithm="dense")
        assert not state.worker.any()
        assert not state.server.any()
        return grad

    # The mean of 4, and 4 and 8 of the nodes; local rank 0 shares elements 0 to 95 (64 of them node 0's).
    expected = torch.full((n,), 4 + (4 + 8) / 4)
    for begin, end, rank in ((0, 64, 0), (64, 96, 2), (96, 128, 1), (128, 150, 3)):
        expected[begin:end] += 8 * (rank + 1)
    for grad in on_grid((2, 2), train):
        assert same_bytes(grad, expected)


@pytest.mark.parametrize(
    ("compressor", "grid", "flat_kilobytes", "kilobytes"),
    [
        (gck.Sign(), (2, 4), 147, 37),
        (gck.Sign(), (4, 2), 221, 111),
        (gck.Quantize(bits=4), (2, 4), 541, 135),
        (gck.Quantize(bits=4), (4, 2), 811, 406),
        (gck.ChunkTopK(), (2, 4), 143, 22),
        (gck.ChunkTopK(), (4, 2), 215, 108),
    ],
    ids=str,
)
def test_bytes_across_nodes(
    compressor: Any, grid: tuple[int, int], flat_kilobytes: int, kilobytes: int
) -> None:
    """The table of docs/collectives.md, and that the cost model says the same of both tiers."""
    (nodes, local), numel = grid, 1 << 20
    flat = SimulatedGroup(nodes * local, timeout=60)

    def reduce(group: Any) -> list[int]:
        tiers = (group.local, group.cross) if isinstance(group, HierarchicalGroup) else (group,)
        before = [tier.group.bytes_sent[tier.rank] for tier in tiers]
        all_reduce_(torch.ones(numel), None, compressor, group, algorithm="two_phase", validate="off")
        after = [tier.group.bytes_sent[tier.rank] for tier in tiers]
        return [b - a for a, b in zip(before, after, strict=True)]

    cost = hierarchical_cost(compressor, [numel], nodes, local, "two_phase")
    assert on_grid(grid, reduce) == [[cost.local.nbytes, cost.cross.nbytes]] * (nodes * local)
    assert round(cost.cross.nbytes / 1000) == kilobytes
    ((sent,), *_) = flat.run(reduce)
    # All messages have one size, and so many of them go to ranks of other nodes.
    assert round(sent * (nodes - 1) * local / (nodes * local - 1) / 1000) == flat_kilobytes


def test_cost() -> None:
    cost = hierarchical_cost(gck.Sign(), [1 << 20], 4, 8, element_nbytes=2)
    assert cost.cross == all_reduce_cost(gck.Sign(), [1 << 17], 4)
    assert cost.local.nbytes == 2 * 7 * 2 * (1 << 17)
    fast, slow = gck.collectives.Link(1e-5, 1e10), gck.collectives.Link(1e-3, 1e7)
    assert cost.seconds(fast, slow) == cost.local.seconds(fast) + cost.cross.seconds(slow)
    assert hierarchical_cost(gck.Sign(), [1 << 16], 4, 8).local.rounds == 7 + 7  # messages of 32 KiB
    assert hierarchical_cost(gck.Sign(), [1 << 14], 4, 8).local.rounds == 1 + 7
    assert hierarchical_cost(gck.Sign(), [1000], 1, 8).cross.nbytes == 0
    assert hierarchical_cost(gck.Sign(), [1000], 8, 1).local == gck.collectives.Cost("dense", 0, 0, 0)
    for nodes, local in ((0, 2), (2, 0), (2, True)):
        with pytest.raises(ArgumentError, match="must be positive ints, got"):
            hierarchical_cost(gck.Sign(), [1000], nodes, local)


def test_a_state_is_of_one_topology() -> None:
    compressor, n = gck.Sign(32), 600

    def use(group: Any, state: ErrorFeedback) -> Tensor:
        return all_reduce_(gradient(group.rank, 0, n), state, compressor, group, algorithm="two_phase")

    def refused(group: Any, states: list[ErrorFeedback]) -> None:
        state, grad = states[group.rank], torch.ones(n)
        worker = state.worker.clone() if state.worker is not None else None
        with pytest.raises(StateMismatchError, match=r"residuals: belong to .*one topology, call reset\(\)"):
            all_reduce_(grad, state, compressor, group, algorithm="two_phase")
        assert (grad == 1).all()
        assert worker is not None
        assert state.worker is not None
        assert torch.equal(worker, state.worker)
        state.reset()
        use(group, state)

    def states_of(run: Callable[[Callable[[Any], ErrorFeedback]], list[ErrorFeedback]]) -> Any:
        def train(group: Any) -> ErrorFeedback:
            state = ErrorFeedback()
            use(group, state)
            return state

        return run(train)

    flat = states_of(SimulatedGroup(6, timeout=60).run)
    tall = states_of(lambda fn: on_grid((2, 3), fn))
    on_grid((2, 3), lambda group: refused(group, flat))
    SimulatedGroup(6, timeout=60).run(lambda member: refused(member, tall))
    tall = states_of(lambda fn: on_grid((2, 3), fn))
    on_grid((3, 2), lambda group: refused(group, tall))
    # Nodes of one rank are a flat group.
    flat = states_of(SimulatedGroup(4, timeout=60).run)
    on_grid((4, 1), lambda group: use(group, flat[group.rank]))


def test_checkpoint() -> None:
    compressor, n = gck.Sign(32), 601

    def train(group: HierarchicalGroup) -> tuple[Tensor, dict[str, Any]]:
        state = ErrorFeedback()
        all_reduce_(gradient(group.rank, 0, n), state, compressor, group, algorithm="two_phase")
        saved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.state_dict().items()}
        loaded = ErrorFeedback()
        loaded.load_state_dict(saved, numel=n, rank=group.rank, world_size=group.world_size)
        assert (loaded.numel, loaded.shard, loaded.binding) == (n, state.shard, state.binding)
        for wrong in ({"rank": group.rank ^ 1}, {"world_size": 2}, {"numel": n - 1}):
            with pytest.raises(StateMismatchError):
                ErrorFeedback().load_state_dict(saved, **wrong)
        with pytest.raises(StateMismatchError, match="in the saved shard"):
            ErrorFeedback().load_state_dict(saved | {"shard": {"numel": 3}})
        again, grad = gradient(group.rank, 1, n), gradient(group.rank, 1, n)
        all_reduce_(grad, state, compressor, group, algorithm="two_phase")
        all_reduce_(again, loaded, compressor, group, algorithm="two_phase")
        assert same_bytes(grad, again)
        return grad, saved

    results = on_grid((2, 2), train)
    assert all(same_bytes(grad, results[0][0]) for grad, _ in results)


def test_a_group_lives_on_from_run_to_run() -> None:
    flat = SimulatedGroup(4, timeout=60)
    groups = flat.run(lambda member: HierarchicalGroup.from_group(member, local_world_size=2))
    for step in range(2):
        results = flat.run(
            lambda member, step=step: all_reduce_(  # type: ignore[misc]
                gradient(member.rank, step, 500), None, gck.Sign(32), groups[member.rank]
            )
        )
        assert all(same_bytes(result, results[0]) for result in results)
