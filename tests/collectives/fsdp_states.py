"""States and failures of the FSDP hook: checks that fsdp_worker.py runs, on models of their own."""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gck
from gck.collectives import all_reduce_
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    DtypeError,
    GroupUnusableError,
    StateMismatchError,
)
from gck.integrations import fsdp
from gck.integrations.hook_state import HookState
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import EVERYTHING
from tests.collectives.fragile import Fragile
from tests.collectives.fsdp_model import (
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
        directory = shared_folder()
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


def shared_folder() -> Path:
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def check_the_newest_step_of_all_shards() -> None:
    """As if those of one shard had been killed before they saved the last step, or all steps."""
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across())
    directory = shared_folder()
    assert state.load(directory) is None
    for step in range(3):
        train(model, range(step, step + 1))
        written = state.save(directory, keep=3)
        dist.barrier()
    assert len(list(directory.glob("*/*.safetensors"))) == 12
    dist.barrier()
    late = mesh().get_local_rank("shard") == 1
    if late:
        written.unlink()
    dist.barrier()
    loaded = state.load(directory)
    assert loaded is not None
    assert loaded.step == state.step == 2
    dist.barrier()
    if late:
        for path in directory.glob("shard-00001-of-00002/*.safetensors"):
            path.unlink(missing_ok=True)
    dist.barrier()
    with pytest.raises(StateMismatchError, match=r"of this replica have \[\[1, 2\], \[\]\]"):
        state.load(directory)
    dist.barrier()
    if dist.get_rank() == 0:
        for index in range(2):
            (directory / f"shard-0000{index}-of-00002").rename(directory / f"shard-0000{index}-of-00004")
    dist.barrier()
    with pytest.raises(StateMismatchError, match=r"\[\[\], \[\]\], and there is shard-0000.-of-00004"):
        state.load(directory)


def check_replicas_without_a_common_directory() -> None:
    """They agree on the newest step that all have, and on none where one has nothing."""
    model = sharded()
    state = gck.fsdp.register(model, Sign(32), across())
    replica = mesh().get_local_rank("replica")
    directory = shared_folder() / str(replica)
    for step in range(3):
        train(model, range(step, step + 1))
        if step < 2 or replica == 0:
            state.save(directory, shared=False, keep=3)
    dist.barrier()
    loaded = state.load(directory, shared=False)
    assert loaded is not None
    assert loaded.step == state.step == 2
    if replica:
        directory = directory / "empty"
    with pytest.raises(StateMismatchError, match="has no step that all shards of all replicas have"):
        state.load(directory, shared=False)
    assert state.step == 2
    loaded = state.load(directory.parent if replica else directory, step=1, shared=False)
    assert loaded is not None
    assert loaded.step == 1


def check_loading_is_passed_on() -> None:
    state = gck.fsdp.register(sharded(), Sign(32), across())
    options: dict[str, Any] = {"step": 7, "reshard": True, "server": "fold", "shared": False}
    with mock.patch.object(HookState, "load") as load, mock.patch.object(HookState, "save") as save:
        state.load("folder", **options)
        state.save("folder", keep=5, shared=False)
    folder = Path(f"folder/shard-0000{state.shard[0]}-of-00002")
    load.assert_called_once_with(folder, **options)
    save.assert_called_once_with(folder, keep=5, shared=False)


def check_an_interrupt_before_anything_is_sent() -> None:
    """Peers wait for these gradients: they are told, and the group is given up."""
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    model = sharded()
    gck.fsdp.register(model, Sign(32), group)
    loss = loss_of(model, 0)
    broken = mock.patch.object(fsdp, "prepare_groups", side_effect=KeyboardInterrupt)
    with broken, pytest.raises(KeyboardInterrupt):
        loss.backward()
    with pytest.raises(GroupUnusableError, match=r"KeyboardInterrupt in gck.fsdp.hook"):
        all_reduce_(torch.zeros(8), None, Sign(32), group)


def check_options_are_passed_on() -> None:
    options: dict[str, Any] = {"validate": "always", "timeout": 12.5, "checksum": True, "measure": True}
    link = gck.collectives.Link(0.1, 1e6)
    state = gck.fsdp.register(
        sharded(), Sign(32), across(), 7, 200, False, link=link, bypass_names=["2.weight"], **options
    )
    assert {name: getattr(state, name) for name in options} == options
    assert (state.warmup_steps, state.bypass_numel, state.bypass_1d) == (7, 200, False)
    assert (state.link, state.bypass_names, state.algorithm) == (link, {"2.weight"}, "auto")


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
    said = "2.weight of rank 1 of the group is not" if mesh().get_local_rank("shard") else "in another shard"
    with pytest.raises(CollectiveMismatchError, match=said):
        gck.fsdp.register(model, Sign(), across())
    frozen = network()
    frozen[0].requires_grad_(rank == 0)
    fully_shard(frozen[0], mesh=mesh()["shard"])
    with pytest.raises(CollectiveMismatchError, match="rank 1 of the group has parameters of other names"):
        gck.fsdp.register(fully_shard(frozen, mesh=mesh()["shard"]), Sign(), across())
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
    for again in (model, model[0], model[2]):
        with pytest.raises(GroupUnusableError, match=r"an earlier backward pass failed .MemoryError: call 2"):
            again(torch.randn(4, again.in_features if again is not model else 33))


def check_a_group_that_is_gone() -> None:
    """FSDP does not survive what leaves the hook, wherever it comes from."""
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    model = sharded()
    gck.fsdp.register(model, Sign(32), group)
    train(model, range(1))
    dist.destroy_process_group(group)
    with pytest.raises(GroupUnusableError):
        loss_of(model, 1).backward()
    with pytest.raises(GroupUnusableError, match="which FSDP does not survive"):
        loss_of(model, 2)
