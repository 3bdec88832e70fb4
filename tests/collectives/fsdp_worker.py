"""The FSDP hook on four ranks: two replicas of a model, each sharded over two ranks."""

from __future__ import annotations

import copy
import io
import math
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import gck
from gck.collectives import all_reduce_
from gck.compressor import Compressor
from gck.error_feedback import ErrorFeedback
from gck.errors import ArgumentError, CollectiveMismatchError, ShapeMismatchError, StateMismatchError
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives import launcher
from tests.collectives.fragile import Fragile

EVERYTHING: dict[str, Any] = {"bypass_numel": 0, "bypass_1d": False}
BY_NAME: dict[str, Compressor | None] = {"0.weight": TopK(ratio=0.1), "4.*": None, "*": Sign(32)}
MESH: list[DeviceMesh] = []


def mesh() -> DeviceMesh:
    if not MESH:
        MESH.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    return MESH[0]


def across() -> dist.ProcessGroup:
    return mesh()["replica"].get_group()


def network() -> nn.Sequential:
    """Rows that two ranks can't share evenly, and a parameter of one row, of which one rank has nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(33, 47), nn.Tanh(), nn.Linear(47, 40), nn.Tanh(), nn.Linear(40, 3), nn.Linear(3, 1)]
    return nn.Sequential(*layers)


def sharded(**options: Any) -> Any:
    """The first layer by itself, two that share a group, and the rest."""
    model, options = network(), {"mesh": mesh()["shard"], **options}
    fully_shard(model[0], **options)
    fully_shard([model[2], model[4]], **options)
    return fully_shard(model, **options)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return model(torch.randn(4, 33, generator=generator).to(dtype)).square().mean()


def train(model: nn.Module, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local()
    return part


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(same_bytes(local(x).detach(), local(y).detach()) for x, y in pairs)


def groups_of(model: nn.Module) -> list[FSDPModule]:
    """A module for each group of parameters."""
    return [m for name, m in model.named_modules() if isinstance(m, FSDPModule) and name != "4"]


def with_dense_hook(model: Any) -> Any:
    def hook(output: Tensor) -> None:
        dist.all_reduce(output, group=across())
        output.div_(2)

    for module in groups_of(model):
        module.set_all_reduce_hook(hook)
    return model


def with_own_hooks(model: Any, reduce: Callable[[str, Tensor], None]) -> Any:
    """Calls `reduce` with every name and this rank's part of its gradient, in the hook of its group."""
    shapes = {name: tuple(p.shape) for name, p in network().named_parameters()}
    for module, prefixes in zip(groups_of(model), ("5", "0", "24"), strict=True):
        names = [name for name in shapes if name[0] in prefixes]

        def hook(output: Tensor, names: list[str] = names) -> None:
            at = 0
            for name in names:
                rows, *rest = shapes[name]
                stride, first = -(-rows // 2), mesh().get_local_rank("shard") * -(-rows // 2)
                here = max(0, min(rows, first + stride) - first)
                reduce(name, output[at : at + here * math.prod(rest)])
                at += stride * math.prod(rest)
            assert at == output.numel()

        module.set_all_reduce_hook(hook)
    return model


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
    dense = with_dense_hook(sharded())
    train(dense, range(4))
    assert not same(dense, model)
    shards = [torch.empty_like(local(model[0].weight)) for _ in range(2)]
    dist.all_gather(shards, local(model[0].weight).detach(), group=across())
    assert same_bytes(shards[0], shards[1]), "replicas drifted"


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


def check_resume_is_as_if_never_stopped() -> None:
    for compressor in (Sign(32), TopK(ratio=0.05)):
        options: dict[str, Any] = {"warmup_steps": 1, "bypass_numel": 200}
        whole, first, second, third = (sharded() for _ in range(4))
        whole_state = gck.fsdp.register(whole, compressor, across(), **options)
        train(whole, range(5))
        first_state = gck.fsdp.register(first, compressor, across(), **options)
        train(first, range(3))
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "gck": first_state.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared)
        directory = Path(shared[0], str(mesh().get_local_rank("shard")))
        first_state.save(directory)
        dist.barrier()
        for model, by_file in ((second, False), (third, True)):
            model.load_state_dict(saved["model"])
            state = gck.fsdp.register(model, compressor, across(), **options)
            if by_file:
                assert state.load(directory) is not None
            else:
                state.load_state_dict(saved["gck"])
            assert state.step == 3
            train(model, range(3, 5))
            assert same(whole, model)
            for name, residuals in whole_state.residuals.items():
                assert same_bytes(residuals.worker, state.residuals[name].worker)
        other = copy.deepcopy(saved["gck"])
        other["rank"] = 1 - other["rank"]
        with pytest.raises(StateMismatchError, match="every rank saves and loads its own"):
            first_state.load_state_dict(other)


def check_failure_leaves_everything_as_it_was() -> None:
    model = sharded()
    failing = Fragile(Sign(32), fail_at=2)
    given: Any = {"0.bias": TopK(ratio=0.5), "0.weight": failing, "*": TopK(ratio=0.5)}
    state = gck.fsdp.register(model, given, across(), algorithm="one_phase", **EVERYTHING)
    with pytest.raises(MemoryError, match="call 2"):
        loss_of(model, 0).backward()
    # The first layer is the last to be reduced; its bias goes in a message before that of the weight.
    assert state.residuals["0.weight"].worker is None
    assert state.residuals["0.bias"].worker is None
    assert model[0].weight.grad is None
    assert state.residuals["2.weight"].worker is not None  # of a group that was reduced before


def check_statistics() -> None:
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across(), measure=True, algorithm="two_phase")
    loss_of(model, 0).backward()
    taken = state.residuals.statistics()
    assert sorted(taken) == ["0.weight", "2.weight"]
    assert all(0 < float(each.left) < 1 for each in taken.values())
    assert int(taken["0.weight"].selected) == local(model[0].weight).numel()


def check_wrong_registrations() -> None:
    model = sharded()
    with pytest.raises(ArgumentError, match=r"shares ranks \[\d, \d\] with the mesh of 5.weight"):
        gck.fsdp.register(model, Sign(), mesh()["shard"].get_group())
    with pytest.raises(ArgumentError, match=r"shares ranks \[\d, \d\] with the mesh of 5.weight"):
        gck.fsdp.register(model, Sign(), None)
    gck.fsdp.register(model, Sign(), across())
    with pytest.raises(ArgumentError, match="the model itself has an all-reduce hook already"):
        gck.fsdp.register(model, Sign(), across())
    twice: Any = fully_shard(network(), mesh=mesh())
    with pytest.raises(ArgumentError, match="torch itself reduces the model itself between replicas, dense"):
        gck.fsdp.register(twice, Sign(), across())
    with torch.device("meta"):
        empty = nn.Linear(40, 40)
    with pytest.raises(ArgumentError, match="weight is on the meta device"):
        gck.fsdp.register(fully_shard(empty, mesh=mesh()["shard"]), Sign(), across())
    unsharded = fully_shard(nn.Linear(40, 40), mesh=mesh()["shard"])
    unsharded.unshard()
    with pytest.raises(ArgumentError, match="not sharded at present"):
        gck.fsdp.register(unsharded, Sign(), across())
    with pytest.raises(ArgumentError, match="model has no parameter for 'embed' of compressor"):
        gck.fsdp.register(sharded(), {"embed": Sign(), "*": Sign()}, across())


def check_replicas_that_differ() -> None:
    """On all ranks, with the group as usable as before."""
    rank = dist.get_rank(across())
    model = network()
    with torch.no_grad():
        model[2].weight[39, 46] += rank  # of the second shard alone
    fully_shard(model, mesh=mesh()["shard"])
    if mesh().get_local_rank("shard"):
        with pytest.raises(
            CollectiveMismatchError, match=r"2.weight of rank 1 of the group is not that of rank 0"
        ):
            gck.fsdp.register(model, Sign(), across())
    else:
        gck.fsdp.register(model, Sign(), across())
    other = fully_shard(nn.Linear(40, 40 + rank), mesh=mesh()["shard"])
    with pytest.raises(
        CollectiveMismatchError, match="rank 1 of the group has parameters of other names, shapes"
    ):
        gck.fsdp.register(other, Sign(), across())
    gck.fsdp.register(sharded(), Sign(), across())


# The failure gives the group up.
CHECKS = sorted((name for name in globals() if name.startswith("check_")), key=lambda name: "failure" in name)


if __name__ == "__main__":
    directory, _, _ = launcher.init()
    results = {}
    for name in CHECKS:
        try:
            globals()[name]()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break  # ranks may be out of step now
    launcher.report(directory, dist.get_rank(), results)
    launcher.leave()
