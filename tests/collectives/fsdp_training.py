"""Training with the FSDP hook: checks that fsdp_worker.py runs, on models of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gck
from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedback
from gck.errors import ShapeMismatchError
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import EVERYTHING
from tests.collectives.fsdp_model import (
    BY_NAME,
    across,
    local,
    loss_of,
    mesh,
    network,
    same,
    sharded,
    train,
    with_dense_hook,
    with_own_hooks,
)


def check_everything_kept_is_a_dense_mean() -> None:
    for options in ({}, {"reshard_after_forward": False}):
        dense, packed = with_dense_hook(sharded(**options)), sharded(**options)
        state = gck.fsdp.register(packed, TopK(ratio=1.0), across(), algorithm="one_phase", **EVERYTHING)
        train(dense, range(3))
        train(packed, range(3))
        assert same(dense, packed)
        assert state.step == 3
        assert len(state.residuals) == 8


def check_each_parameter_is_as_if_reduced_alone() -> None:
    states = {name: ErrorFeedback() for name, _ in network().named_parameters()}

    def alone(name: str, grad: Tensor) -> None:
        chosen = (
            None if name[0] == "4" or "bias" in name or name == "5.weight" else BY_NAME.get(name, Sign(32))
        )
        # A shard is rows of the matrix.
        grad = grad.view(-1, 47) if name == "2.weight" else grad
        all_reduce_(grad, states[name], chosen or Sign(32), across(), algorithm="auto" if chosen else "dense")

    twin, model = with_own_hooks(sharded(), alone), sharded()
    state = gck.fsdp.register(model, BY_NAME, across())
    train(twin, range(4))
    train(model, range(4))
    assert same(twin, model)
    assert sorted(state.residuals) == ["0.weight", "2.weight"]
    for name, residuals in state.residuals.items():
        assert residuals.worker is not None
        assert residuals.worker.any()
        assert same_bytes(residuals.worker, states[name].worker)
    basis = states["2.weight"].basis
    assert basis is not None
    assert tuple(basis.shape) == (2, 47)
    assert same_bytes(state.residuals["2.weight"].basis, basis)
    dense = with_dense_hook(sharded())
    train(dense, range(4))
    assert not same(dense, model)
    shards = [torch.empty_like(local(model[0].weight)) for _ in range(2)]
    dist.all_gather(shards, local(model[0].weight).detach(), group=across())
    assert same_bytes(shards[0], shards[1]), "replicas drifted"


def check_seeds_are_those_of_the_step() -> None:
    """Of every group of parameters, in whatever order these come."""
    states = {name: ErrorFeedback() for name, _ in network().named_parameters()}
    steps = dict.fromkeys(states, 0)

    def alone(name: str, grad: Tensor) -> None:
        seeded = RandomK(ratio=0.25, seed=steps[name])
        all_reduce_(grad, states[name], seeded, across(), algorithm="one_phase")
        steps[name] += 1

    twin, model = with_own_hooks(sharded(), alone), sharded()
    gck.fsdp.register(model, RandomK(ratio=0.25), across(), algorithm="one_phase", **EVERYTHING)
    train(twin, range(3))
    train(model, range(3))
    assert same(twin, model)


def check_warm_up_is_dense() -> None:
    dense, packed = with_dense_hook(sharded()), sharded()
    state = gck.fsdp.register(packed, Sign(32), across(), warmup_steps=2, **EVERYTHING)
    train(dense, range(2))
    train(packed, range(2))
    assert same(dense, packed)
    assert len(state.residuals) == 0
    train(dense, range(2, 3))
    train(packed, range(2, 3))
    assert not same(dense, packed)
    assert state.step == 3


def check_accumulation() -> None:
    """Error feedback sees the accumulated gradient, once."""
    models = [sharded(), sharded()]
    states = [gck.fsdp.register(each, Sign(32), across(), **EVERYTHING) for each in models]
    models[0].set_requires_gradient_sync(False)
    loss_of(models[0], 0).backward()
    assert states[0].step == 0
    models[0].set_requires_gradient_sync(True)
    loss_of(models[0], 1).backward()
    (loss_of(models[1], 0) + loss_of(models[1], 1)).backward()
    assert [state.step for state in states] == [1, 1]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(local(a.grad), local(b.grad), atol=1e-6)


def check_mixed_precision() -> None:
    for reduce_dtype in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        dense, packed = with_dense_hook(sharded(mp_policy=policy)), sharded(mp_policy=policy)
        gck.fsdp.register(packed, TopK(ratio=1.0), across(), algorithm="one_phase", **EVERYTHING)
        for model in (dense, packed):
            loss_of(model, 0, torch.bfloat16).backward()
        for a, b in zip(dense.parameters(), packed.parameters(), strict=True):
            assert local(a.grad).dtype == torch.float32
            assert torch.allclose(local(a.grad), local(b.grad), rtol=2**-7, atol=1e-7)


def check_frozen_parameters() -> None:
    """As of adapters: in one group with those that are trained, and a group that is frozen whole."""
    models = []
    for _ in range(2):
        model = network()
        model[0].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        fully_shard(model[0], mesh=mesh()["shard"])
        fully_shard([model[2], model[4]], mesh=mesh()["shard"])
        models.append(fully_shard(model, mesh=mesh()["shard"]))
    dense, packed = with_dense_hook(models[0]), models[1]
    state = gck.fsdp.register(packed, TopK(ratio=1.0), across(), algorithm="one_phase", **EVERYTHING)
    loss_of(dense, 0).backward()
    loss_of(packed, 0).backward()
    for a, b in zip(dense.parameters(), packed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
        assert a.grad is None or same_bytes(local(a.grad), local(b.grad))
    assert sorted(state.residuals) == ["2.bias", "4.bias", "4.weight", "5.bias", "5.weight"]


def check_frozen_between_steps() -> None:
    """Also of parameters that stay whole, whose flags FSDP goes by: gradients keep to their own residuals."""
    for stays in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
        fully_shard(model, mesh=mesh()["shard"], reshard_after_forward=not stays)
        model.set_reshard_after_backward(not stays)
        state = gck.fsdp.register(model, {"0.*": Sign(32), "1.*": None}, across(), algorithm="two_phase")
        x = torch.randn(4, 40)
        model(x).square().mean().backward()
        before = state.residuals["0.weight"].worker
        assert before is not None
        before = before.clone()
        model[0].weight.requires_grad_(False)
        model(x).square().mean().backward()
        assert same_bytes(state.residuals["0.weight"].worker, before), stays
        model[0].weight.requires_grad_(True)
        model(x).square().mean().backward()
        assert not same_bytes(state.residuals["0.weight"].worker, before)
        assert list(state.residuals) == ["0.weight"]


def check_what_is_unfrozen_late_does_not_warm_up_again() -> None:
    """It is as far as the others, as after a state is loaded."""
    model: Any = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    model[0].weight.requires_grad_(False)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh()["shard"])
    state = gck.fsdp.register(model, Sign(32), across(), 2, algorithm="two_phase")
    x = torch.randn(4, 40)
    for _ in range(3):
        model(x).square().mean().backward()
    assert list(state.residuals) == ["1.weight"]
    model[0].weight.requires_grad_(True)
    model(x).square().mean().backward()
    assert state.step == 4
    assert sorted(state.residuals) == ["0.weight", "1.weight"]


class Sometimes(nn.Module):
    """A layer that is used when asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(33, 40), nn.Linear(40, 40)

    def forward(self, x: Tensor, all_of_it: bool) -> Tensor:
        y: Tensor = self.used(x)
        return self.unused(y) if all_of_it else y


def check_unused_parameters() -> None:
    """FSDP leaves them out, which would move every gradient behind them to another's residual."""
    model: Any = fully_shard(Sometimes(), mesh=mesh()["shard"])
    state = gck.fsdp.register(model, Sign(32), across(), **EVERYTHING)
    x = torch.randn(4, 33)
    model(x, True).square().mean().backward()
    before = {name: each.worker.clone() for name, each in state.residuals.items() if each.worker is not None}
    assert len(before) == 4
    with pytest.raises(ShapeMismatchError, match=r"set_reduce_scatter_unused_params\(True\) on the model"):
        model(x, False).square().mean().backward()
    assert state.step == 1
    assert all(same_bytes(state.residuals[name].worker, worker) for name, worker in before.items())
    if not hasattr(model, "set_reduce_scatter_unused_params"):
        return
    again: Any = fully_shard(Sometimes(), mesh=mesh()["shard"])
    again.set_reduce_scatter_unused_params(True)
    state = gck.fsdp.register(again, Sign(32), across(), **EVERYTHING)
    again(x, False).square().mean().backward()
    assert state.step == 1


def check_statistics() -> None:
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across(), measure=True, algorithm="two_phase")
    loss_of(model, 0).backward()
    taken = state.residuals.statistics()
    assert sorted(taken) == ["0.weight", "2.weight"]
    assert all(0 < float(each.left) < 1 for each in taken.values())
    assert int(taken["0.weight"].selected) == local(model[0].weight).numel()
