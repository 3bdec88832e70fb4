"""One rank of test_hierarchical_processes.py: two nodes of two ranks, made in both ways; one rank dies."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError, CollectiveError, CollectiveMismatchError, GckError
from tests.cases import same_bytes
from tests.collectives import launcher, scenarios

LOST = 3


def run(group: gck.HierarchicalGroup) -> dict[str, list[str]]:
    """(digest of what all ranks must share, digest of this rank's residuals) by scenario."""
    found = {}
    for compressor in (gck.TopK(ratio=0.1), gck.Sign(32), gck.ChunkTopK(k=6, chunk_size=64, value_bits=2)):
        for n in (0, 1, 33, 1001):
            state, results = ErrorFeedback(), []
            for step in range(2):
                results.append(scenarios.gradient(group.rank, n, step=step))
                algorithm = "one_phase" if compressor.shard_unit is None else "two_phase"
                gck.all_reduce_(results[-1], state, compressor, group, algorithm=algorithm)
            found[f"{compressor} {n}"] = [
                scenarios.digest(*results),
                scenarios.digest(state.worker, state.server),
            ]
    payload = gck.topk(scenarios.gradient(group.rank, 500), 0.1)
    gathered = gck.sparse_all_gather(payload, group)
    found["gather"] = [scenarios.digest(*(t for p in gathered for t in (p.values, p.indices))), ""]
    return found


def errors(group: Any) -> list[str]:
    """What each rank is told of a mismatch, and of nodes of unequal size."""
    texts = []
    grad = torch.ones(500 + (group.rank == LOST))
    for call in (
        lambda: gck.all_reduce_(grad, None, gck.Sign(32), group),
        lambda: gck.HierarchicalGroup.from_group(None, local_world_size=3),
        lambda: gck.HierarchicalGroup.from_group(None, local_world_size=1 + (group.rank == LOST)),
    ):
        try:
            call()
            texts.append("none")
        except (CollectiveMismatchError, ArgumentError) as error:
            texts.append(str(error))
    return texts


def train(group: gck.HierarchicalGroup) -> tuple[str, bool]:
    """DDP's hook on two tiers: a digest of the trained parameters, and whether a checkpoint has all."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(64, 48)
    model = DistributedDataParallel(inner)
    state = gck.ddp.register(model, gck.Sign(32), group=group, bypass_numel=0, algorithm="two_phase")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(scenarios.gradient(group.rank, 5 * 64, step=step).view(5, 64)).square().mean().backward()
        optimizer.step()
    saved = state.state_dict()
    again = gck.ddp.HookState(gck.Sign(32), model=inner, group=group)
    again.load_state_dict(saved)
    weights = [s.residuals["weight"] for s in (state, again)]
    same = weights[0].shard == weights[1].shard is not None and all(
        a is not None and b is not None and same_bytes(a, b)
        for a, b in ((weights[0].worker, weights[1].worker), (weights[0].server, weights[1].server))
    )
    return scenarios.digest(*(p.detach() for p in inner.parameters())), same


def failure(group: gck.HierarchicalGroup) -> list[Any]:
    """The error that a dead rank is to this one, and whether everything is as it was."""
    grad, state = scenarios.gradient(group.rank, 1001), ErrorFeedback()
    gck.all_reduce_(grad.clone(), state, gck.Sign(32), group, algorithm="two_phase")
    assert state.worker is not None
    if group.rank == LOST:
        os._exit(0)
    before, worker = grad.clone(), state.worker.clone()
    try:
        gck.all_reduce_(grad, state, gck.Sign(32), group, algorithm="two_phase", validate="off")
        return ["none", False, ""]
    except GckError as error:
        typed = isinstance(error, CollectiveError)
        return [
            type(error).__name__,
            typed and torch.equal(grad, before) and torch.equal(state.worker, worker),
            str(error),
        ]


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=20)
    by_size = gck.HierarchicalGroup.from_group(local_world_size=2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "local"))
    by_mesh = gck.HierarchicalGroup.from_mesh(mesh)
    result: dict[str, Any] = {"rank": [by_size.rank, by_mesh.rank], "timeout": by_size.timeout}
    result |= {"by_size": run(by_size), "by_mesh": run(by_mesh), "errors": errors(by_size)}
    try:
        gck.HierarchicalGroup.from_mesh(init_device_mesh("cpu", (4,)))
    except ArgumentError as error:
        result["flat mesh"] = str(error)
    result["again"] = run(by_size)
    result["trained"] = train(by_mesh)
    torch.distributed.barrier()
    result["failure"] = failure(by_size)
    launcher.report(directory, rank, result)
    launcher.leave()
