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

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from gck.collectives import Link, resolve
from gck.collectives.work import perform
from gck.compressor_choice import Choosable
from gck.errors import CollectiveMismatchError
from gck.integrations.groups import grouped, prepare_groups
from gck.integrations.hook_checks import check_layout
from gck.integrations.replicas import check_replicas
from gck.integrations.sharded_state import ShardedHookState
from gck.integrations.shards import Shards, check_shards, shards_of

__all__ = ["ShardedHookState", "register"]


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
    """Registers the hook on every group of parameters of `model`; collective over all ranks.

    Args:
        model: with all its `fully_shard`s, each on the mesh of one replica, and with its parameters in place,
            loaded ones as well: replicas are compared here, and never again.
        compressor: for every parameter that is not bypassed, or by name; as for `gck.ddp.HookState`.
        group: the ranks that hold the same shard of different replicas.
        bypass_numel: counts elements of whole parameters, not of shards.
        validate: as for `gck.all_reduce_`; with "always" replicas that use other modules in a step, or the
            same in another order, find that out at every step, and not only at the first of each message.
        warmup_steps, bypass_1d, algorithm, timeout, checksum, link, measure, bypass_names: as for
            `gck.ddp.HookState`.

    Returns:
        The state, whose `state_dict` belongs into the checkpoint of its rank.

    Raises:
        DtypeError: model was not sharded by fully_shard, gradients are of a dtype that gck does not take, or
            an option has a wrong type.
        ArgumentError: an option is out of range; a group of parameters has a hook already, is replicated by
            torch itself (a mesh of two dimensions), or shares ranks with `group`; parameters are not sharded
            now, or by nobody, or still on the meta device.
        CollectiveMismatchError: parameters differ between replicas, in any shard; on all ranks.
        BackendUnavailableError: this torch has no such hook.
        GroupUnusableError: the group was destroyed, or an earlier failure spoilt it.
    """
    function = "gck.fsdp.register"
    shards = shards_of(function, model)
    check_shards(function, model, shards, group)
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
    local: dict[str, Tensor] = {}
    about = []
    for each in shards:
        for i, parameter in enumerate(each.parameters):
            name, chosen = state.label(parameter), state.compressor_of(parameter)
            if parameter.requires_grad and chosen is not None:
                # Of every rank of the replica, so that all of them find it.
                for numel in sorted(each.sizes(i)):
                    check_layout(function, f"a shard of {name}", numel, chosen)
            local[name] = parameter.to_local()
            about.append(each.about(i))
    failed: CollectiveMismatchError | None = None
    try:
        check_replicas(function, transport, local, about)
    except CollectiveMismatchError as error:
        failed = error
    if state.any_of_replica(failed is not None):
        raise failed or CollectiveMismatchError(
            f"{function}: replicas differ in another shard; ranks that hold it say where"
        )
    for each in shards:
        each.module.set_all_reduce_hook(_hook(state, each))
    check_alive = torch.compiler.disable(state.check_alive)
    for module in {model, *(m for m in model.modules() if hasattr(m, "set_all_reduce_hook"))}:
        module.register_forward_pre_hook(check_alive, prepend=True)
    return state


def _hook(state: ShardedHookState, shards: Shards) -> Callable[[Tensor], None]:
    def hook(output: Tensor) -> None:
        """Averages what FSDP has reduced among the ranks of a replica; its errors leave `loss.backward()`."""
        transport = None
        try:
            transport = resolve(state.group, state.timeout)
            # A group without gradients for some time, as it was frozen, is as far as the others.
            shards.reductions = max(shards.reductions, state.step - 1)
            groups = grouped(state, shards.pairs(output), warm_up=shards.reductions < state.warmup_steps)
            reduce = prepare_groups("gck.fsdp.hook", state, groups, transport, shards.reductions)
            perform(transport, "gck.fsdp.hook", reduce, output.device, False)
        except BaseException as error:
            state._failed = f"{type(error).__name__}: {error}"
            if transport is not None and not isinstance(error, Exception):
                transport.abort(f"{type(error).__name__} in gck.fsdp.hook")  # peers wait for these gradients
            raise
        shards.reductions += 1

    return hook
