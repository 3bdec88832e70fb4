"""A hook for torch's fully_shard (FSDP2): compresses between replicas of sharded models, as data centres are.

    mesh = init_device_mesh("cuda", (centres, ranks), mesh_dim_names=("replica", "shard"))
    fully_shard(model, mesh=mesh["shard"])  # of one replica: fast links
    state = gck.fsdp.register(model, gck.Sign(), group=mesh["replica"].get_group())  # slow ones

torch shards parameters over the ranks of one replica and reduces gradients among them, dense. Then every rank
has the mean of its replica for its shard, and the hook averages it with the same shard of the other replicas:
each sends only what it holds. Residuals are kept per parameter name, of this rank's shard.

The hook is called once for each group of parameters (`fully_shard` of a module, or of a list of modules makes
one), in the order of the backward pass, and not where `set_requires_gradient_sync(False)` accumulates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gck.collectives import Link, resolve
from gck.collectives.work import perform
from gck.compressor_choice import Choosable
from gck.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeMismatchError
from gck.integrations.groups import grouped, prepare_groups
from gck.integrations.hook_checks import check_layout
from gck.integrations.hook_state import HookState
from gck.integrations.replicas import check_replicas
from gck.values import shown

__all__ = ["ShardedHookState", "register"]

_REGISTER, _HOOK = "gck.fsdp.register", "gck.fsdp.hook"


@dataclass
class _Shards:
    """This rank's part of the parameters that FSDP reduces together.

    Attributes:
        module: one that `fully_shard` was called for.
        parameters: as `named_parameters` has them while they are sharded.
        numels: elements of this rank's part of each.
        strides: the same with the zeros behind it, which make all ranks' parts equally long.
        reductions: how often they were reduced.
    """

    module: Any
    parameters: list[Any]
    numels: list[int]
    strides: list[int]
    reductions: int = 0

    def pairs(self, output: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parameters that are not frozen, and their gradients in what FSDP has reduced.

        Raises:
            ShapeMismatchError: it is not of all of them.
        """
        places = zip(self.parameters, self.numels, self.strides, strict=True)
        trained = [place for place in places if place[0].requires_grad]
        strides = [stride for *_, stride in trained]
        if output.numel() != sum(strides):
            raise ShapeMismatchError(
                f"{_HOOK}: FSDP reduced {output.numel()} elements, {len(strides)} parameters have shards of "
                f"{sum(strides)}: those without a gradient are left out, unless you call "
                "set_reduce_scatter_unused_params(True) on the model"
            )
        parts = output.split(strides)
        return [(parameter, part[:numel]) for (parameter, numel, _), part in zip(trained, parts, strict=True)]


class ShardedHookState(HookState):
    """What the hook keeps from step to step: a `HookState` whose residuals are of this rank's shards.

    `save` and `load` take a directory for each shard, since ranks of one group hold the same shard of
    different replicas: f"{directory}/{mesh.get_local_rank('shard')}".

    Attributes:
        step: the reductions of the group of parameters that had most, warm-up included.
    """

    def __init__(self, shards: Sequence[_Shards], compressor: Choosable, *args: Any, **options: Any) -> None:
        self._shards = shards
        super().__init__(compressor, *args, overlap=False, **options)

    @property
    def step(self) -> int:
        return max(each.reductions for each in self._shards)

    @step.setter
    def step(self, value: int) -> None:
        for each in self._shards:
            each.reductions = value

    def _numels(self) -> dict[str, int]:
        return {
            self._names[id(parameter)]: numel
            for each in self._shards
            for parameter, numel in zip(each.parameters, each.numels, strict=True)
        }


def register(
    model: nn.Module,
    compressor: Choosable,
    group: Any,
    warmup_steps: int = 0,
    bypass_numel: int = 1024,
    bypass_1d: bool = True,
    *,
    algorithm: str = "auto",
    validate: str = "first",
    timeout: float | None = None,
    checksum: bool = False,
    link: Link | None = None,
    measure: bool = False,
    bypass_names: Collection[str] = (),
) -> ShardedHookState:
    """Registers the hook on every group of parameters of `model`; collective over `group`.

    Args:
        model: with all its `fully_shard`s, each on the mesh of one replica, and with its parameters in place.
        compressor: for every parameter that is not bypassed, or by name; as for `gck.ddp.HookState`.
        group: the ranks that hold the same shard of different replicas.
        bypass_numel: counts elements of whole parameters, not of shards.
        warmup_steps, bypass_1d, algorithm, validate, timeout, checksum, link, measure, bypass_names: as for
            `gck.ddp.HookState`.

    Returns:
        The state, whose `state_dict` belongs into the checkpoint of its rank.

    Raises:
        DtypeError: model was not sharded by fully_shard, or an option has a wrong type.
        ArgumentError: an option is out of range; a group of parameters has a hook already, is replicated by
            torch itself (a mesh of two dimensions), or shares ranks with `group`; parameters are not sharded
            now, or still on the meta device.
        CollectiveMismatchError: parameters differ between replicas, on all ranks of `group`.
        BackendUnavailableError: this torch has no such hook.
        GroupUnusableError: the group was destroyed, or an earlier failure spoilt it.
    """
    shards = [_Shards(*found) for found in _parameter_groups(model)]
    named = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    for each in shards:
        for parameter in each.parameters:
            _check_parameter(parameter, names, group)
    state = ShardedHookState(
        shards,
        compressor,
        warmup_steps,
        bypass_numel,
        bypass_1d,
        model,
        group,
        algorithm=algorithm,
        validate=validate,
        timeout=timeout,
        checksum=checksum,
        link=link,
        measure=measure,
        bypass_names=bypass_names,
    )
    transport = resolve(state.group, state.timeout)
    for each in shards:
        for parameter, numel in zip(each.parameters, each.numels, strict=True):
            chosen = state.compressor_of(parameter) if parameter.requires_grad else None
            if chosen is not None:
                check_layout(_REGISTER, names[id(parameter)], numel, chosen)
    sharded = [parameter for each in shards for parameter in each.parameters]
    local = {names[id(parameter)]: parameter.to_local() for parameter in sharded}
    check_replicas(_REGISTER, transport, local, [parameter.shape for parameter in sharded])
    for each in shards:
        each.module.set_all_reduce_hook(_hook(state, each))
    return state


def _hook(state: ShardedHookState, shards: _Shards) -> Callable[[Tensor], None]:
    def hook(output: Tensor) -> None:
        """Averages what FSDP has reduced among the ranks of a replica; its errors leave `loss.backward()`."""
        transport = resolve(state.group, state.timeout)
        try:
            pairs = shards.pairs(output)
            groups = grouped(state, pairs, warm_up=shards.reductions < state.warmup_steps)
            perform(
                transport,
                _HOOK,
                prepare_groups(_HOOK, state, groups, transport),
                output.device,
                False,
            )
        except BaseException as error:
            if not isinstance(error, Exception):
                transport.abort(f"{type(error).__name__} in {_HOOK}")  # peers wait for these gradients
            raise
        shards.reductions += 1

    return hook


def _parameter_groups(model: nn.Module) -> Iterator[tuple[Any, list[Any], list[int], list[int]]]:
    """What `_Shards` is made of, of every group of parameters that FSDP reduces together, once.

    torch shows neither the groups nor how their shards lie behind one another: these names are its own.
    """
    from torch.distributed import fsdp

    version = f"torch {torch.__version__}"
    fsdp_module = getattr(fsdp, "FSDPModule", None)
    if fsdp_module is None or not hasattr(fsdp_module, "set_all_reduce_hook"):
        raise BackendUnavailableError(f"{_REGISTER}: {version} has no FSDPModule.set_all_reduce_hook")
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, fsdp_module):
            continue
        where = f"module {name!r}" if name else "the model itself"
        try:
            group = module._get_fsdp_state()._fsdp_param_group
        except AttributeError as error:
            raise BackendUnavailableError(f"{_REGISTER}: FSDP of {version}: {error}") from error
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ArgumentError(f"{_REGISTER}: {where} has more than one mesh: {error}") from error
        if group is None or id(group) in seen:  # `fully_shard` of a list makes one group of several modules
            continue
        seen.add(id(group))
        if type(group.mesh_info).__name__ != "FSDPMeshInfo":
            raise ArgumentError(
                f"{_REGISTER}: torch itself reduces {where} between replicas, dense; call fully_shard with "
                'the mesh of the shards alone, as mesh["shard"]'
            )
        if group._all_reduce_hook is not None:
            raise ArgumentError(f"{_REGISTER}: {where} has an all-reduce hook already")
        params = group.fsdp_params
        numels = [param.sharded_size.numel() for param in params]
        strides = [param.padded_sharded_param_size.numel() for param in params]
        yield module, [param.sharded_param for param in params], numels, strides
    if not seen:
        raise DtypeError(f"{_REGISTER}: model must be sharded by fully_shard, got {shown(model)}")


def _check_parameter(parameter: Any, names: dict[int, str], group: object) -> None:
    if id(parameter) not in names:
        raise ArgumentError(
            f"{_REGISTER}: a parameter of shape {tuple(parameter.shape)} is not sharded at present; register "
            "before the first forward pass, or call reshard() on the model"
        )
    name = names[id(parameter)]
    if parameter.device.type == "meta":
        raise ArgumentError(f"{_REGISTER}: {name} is on the meta device; register when its values are there")
    group = dist.group.WORLD if group is None else group
    if isinstance(group, dist.ProcessGroup):
        both = set(dist.get_process_group_ranks(group)) & set(parameter.device_mesh.mesh.flatten().tolist())
        if both != {dist.get_rank()}:
            raise ArgumentError(
                f"{_REGISTER}: group must hold the same shard of different replicas, but shares ranks "
                f"{sorted(both)} with the mesh of {name}"
            )
