"""States and failures of the FSDP hook: checks that fsdp_worker.py runs, on models of their own."""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gck
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    DtypeError,
    GroupUnusableError,
    StateMismatchError,
)
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile
from tests.collectives.fsdp_model import (
    EVERYTHING,
    across,
    loss_of,
    mesh,
    network,
    same,
    sharded,
    train,
)


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
        directory = Path(shared[0])
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


def check_states_belong_to_their_shard() -> None:
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across())
    train(model, range(2))
    saved = state.state_dict()
    index = mesh().get_local_rank("shard")
    assert state.shard == (index, 2)
    other = saved | {"shard": [1 - index, 2]}
    with pytest.raises(
        StateMismatchError, match=rf"belongs to shard \[{1 - index}, 2\] .* this is \[{index}, 2\]"
    ):
        state.load_state_dict(other)
    with pytest.raises(StateMismatchError, match="belongs to shard None"):
        state.load_state_dict({name: value for name, value in saved.items() if name != "shard"})
    state.load_state_dict(saved)
    with pytest.raises(ArgumentError, match="not the one that was registered"):
        state.bind(sharded())
    model.unshard()
    with pytest.raises(ArgumentError, match="not sharded now"):
        state.bind(model)
    model.reshard()
    state.bind(model)


def check_the_newest_step_of_all_shards() -> None:
    """As if those of one shard had been killed before they saved the last step, or all steps."""
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across())
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    directory = Path(shared[0])
    assert state.load(directory) is None
    for step in range(2):
        train(model, range(step, step + 1))
        written = state.save(directory)
        dist.barrier()
    assert len(list(directory.glob("*/*.safetensors"))) == 8
    dist.barrier()
    late = mesh().get_local_rank("shard") == 1
    if late:
        written.unlink()
    dist.barrier()
    loaded = state.load(directory)
    assert loaded is not None
    assert loaded.step == state.step == 1
    dist.barrier()
    if late:
        for path in directory.glob("shard-00001-of-00002/*.safetensors"):
            path.unlink(missing_ok=True)
    dist.barrier()
    with pytest.raises(StateMismatchError, match=r"no step of all shards; they have \[\[1\], \[\]\]"):
        state.load(directory)


class Blocks(nn.Module):
    """Two alike, of which ranks use what they want."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor, order: str) -> Tensor:
        for name in order:
            x = getattr(self, name)(x)
        y: Tensor = self.out(x)
        return y


def check_replicas_that_use_other_modules() -> None:
    """Messages of one size: without their names gradients of one block would be averaged with the other's."""
    replica = mesh().get_local_rank("replica")
    model: Any = Blocks()
    for module in (model.a, model.b, model.out, model):
        fully_shard(module, mesh=mesh()["shard"])
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    state = gck.fsdp.register(model, Sign(32), group, validate="always", algorithm="two_phase")
    x = torch.randn(4, 40)
    model(x, "ab").square().mean().backward()
    assert state.step == 1
    with pytest.raises(CollectiveMismatchError, match=r"in shapes or names; .*\((a|b).bias\)"):
        model(x, "b" if replica else "a").square().mean().backward()
    with pytest.raises(GroupUnusableError, match=r"an earlier backward pass failed .CollectiveMismatchError"):
        model(x, "ab")


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
    with pytest.raises(ArgumentError, match="not sharded now"):
        gck.fsdp.register(unsharded, Sign(), across())
    with pytest.raises(ArgumentError, match="model has no parameter for 'embed' of compressor, but"):
        gck.fsdp.register(sharded(), {"embed": Sign(), "*": Sign()}, across())


def check_registrations_of_some_parameters() -> None:
    """Whatever is wrong of one shard is found by all ranks: none goes on alone."""
    partly = network()
    fully_shard(partly[0], mesh=mesh()["shard"])
    with pytest.raises(ArgumentError, match=r"no fully_shard has 2.weight, 2.bias, 4.weight and 3 more"):
        gck.fsdp.register(partly, Sign(), across())
    model = sharded()
    with pytest.raises(ArgumentError, match=r"a shard of 4.bias of 1 elements: TopK: k must be at most"):
        gck.fsdp.register(model, {"4.bias": TopK(k=2), "*": Sign()}, across(), **EVERYTHING)
    with pytest.raises(ArgumentError, match=r"not of this model; register the whole model"):
        gck.fsdp.register(model[2], Sign(), across())
    double = fully_shard(nn.Linear(40, 40).double(), mesh=mesh()["shard"])
    with pytest.raises(DtypeError, match=r"those of weight are of torch.float64"):
        gck.fsdp.register(double, Sign(), across())


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
    with pytest.raises(GroupUnusableError, match=r"an earlier backward pass failed .MemoryError: call 2"):
        loss_of(model, 1)
