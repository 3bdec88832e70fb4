"""What torch's fully_shard keeps on a rank: groups of parameters, and how their shards lie in memory.

torch shows neither. The names here that begin with an underscore are its own, as they are in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gck.errors import ArgumentError, BackendUnavailableError, DtypeError, ShapeMismatchError
from gck.kernels.common.checks import GRAD_DTYPES
from gck.values import shown

__all__ = ["Shards", "check_shards", "shards_of"]


@dataclass
class Shards:
    """This rank's part of the parameters that FSDP reduces together.

    Attributes:
        module: one that `fully_shard` was called for.
        group: FSDP's own notes of it.
        parameters: as `named_parameters` has them while they are sharded.
        reductions: how often they were reduced.
    """

    module: Any
    group: Any
    parameters: list[Any]
    reductions: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """(index, count) of this rank's shard among those of a replica."""
        return self.group.mesh_info.shard_mesh_rank, self.group.mesh_info.shard_mesh_size

    @property
    def numels(self) -> list[int]:
        """Elements of this rank's part of each."""
        return [param.sharded_size.numel() for param in self.group.fsdp_params]

    def pairs(self, output: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parameters that are not frozen, and their gradients in what FSDP has reduced.

        Raises:
            ShapeMismatchError: it is not of all of them.
        """
        # The one that was used in this backward pass knows whether it is frozen.
        live = [getattr(param, "_unsharded_param", param.sharded_param) for param in self.group.fsdp_params]
        # Behind the elements of each are zeros, which make all ranks' parts equally long.
        strides = [param.padded_sharded_param_size.numel() for param in self.group.fsdp_params]
        places = zip(self.parameters, self.numels, strides, live, strict=True)
        trained = [(p, numel, stride) for p, numel, stride, used in places if used.requires_grad]
        strides = [stride for *_, stride in trained]
        if output.numel() != sum(strides):
            raise ShapeMismatchError(
                f"gck.fsdp.hook: FSDP reduced {output.numel()} elements, of {len(strides)} parameters whose "
                f"shards have {sum(strides)}: it leaves out those without a gradient, unless you call "
                "set_reduce_scatter_unused_params(True) on the model"
            )
        parts = output.split(strides)
        return [(parameter, part[:numel]) for (parameter, numel, _), part in zip(trained, parts, strict=True)]

    def sizes(self, i: int) -> set[int]:
        """Elements of the shards that all ranks of a replica have of one."""
        parameter, count = self.parameters[i], self.place[1]
        dim = self.group.fsdp_params[i].fsdp_placement.dim
        rows = torch.empty(parameter.shape[dim], device="meta").chunk(count)
        sizes = {parameter.numel() // max(1, parameter.shape[dim]) * len(chunk) for chunk in rows}
        return sizes | ({0} if len(rows) < count else set())

    def about(self, i: int) -> str:
        """What replicas must have alike of one, beside its values."""
        parameter = self.parameters[i]
        frozen = "" if parameter.requires_grad else " frozen"
        return f"{tuple(parameter.shape)} {parameter.placements} {self.place}{frozen}"


def shards_of(function: str, model: nn.Module) -> list[Shards]:
    """All groups of parameters that `fully_shard` has made in a model, each once.

    Raises:
        DtypeError: there is none.
        ArgumentError: one is reduced between replicas by torch itself, or has a hook already.
        BackendUnavailableError: this torch has no such hook.
    """
    from torch.distributed import fsdp

    version = f"torch {torch.__version__}"
    fsdp_module = getattr(fsdp, "FSDPModule", None)
    if fsdp_module is None or not hasattr(fsdp_module, "set_all_reduce_hook"):
        raise BackendUnavailableError(f"{function}: {version} has no FSDPModule.set_all_reduce_hook")
    found: list[Shards] = []
    for name, module in model.named_modules():
        if not isinstance(module, fsdp_module):
            continue
        where = f"module {name!r}" if name else "the model itself"
        try:
            group = module._get_fsdp_state()._fsdp_param_group
        except AttributeError as error:
            raise BackendUnavailableError(f"{function}: FSDP of {version}: {error}") from error
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ArgumentError(f"{function}: {where} has more than one mesh: {error}") from error
        # `fully_shard` of a list makes one group of several modules.
        if group is None or any(group is shards.group for shards in found):
            continue
        if type(group.mesh_info).__name__ != "FSDPMeshInfo":
            raise ArgumentError(
                f"{function}: torch itself reduces {where} between replicas, dense; call fully_shard with "
                'the mesh of the shards alone, as mesh["shard"]'
            )
        if group._all_reduce_hook is not None:
            raise ArgumentError(f"{function}: {where} has an all-reduce hook already")
        found.append(Shards(module, group, [param.sharded_param for param in group.fsdp_params]))
    if not found:
        raise DtypeError(f"{function}: model must be sharded by fully_shard, got {shown(model)}")
    return found


def check_shards(function: str, model: nn.Module, shards: Sequence[Shards], group: object) -> None:
    """Raises unless every parameter is sharded, has its values, and is another's to average over `group`.

    Raises:
        ArgumentError: as said.
        DtypeError: gradients of a dtype that gck does not take.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Several meshes have several groups to average over, and a state knows one.
    places = sorted({each.place for each in shards})
    if len(places) > 1:
        raise ArgumentError(
            f"{function}: parameters of model are sharded over several meshes, as those of experts are, of "
            f"which this rank has the shards {places} (index, count); it takes one mesh for all of them"
        )
    members = dist.group.WORLD if group is None else group
    ranks = dist.get_process_group_ranks(members) if isinstance(members, dist.ProcessGroup) else None
    for parameter, policy in _parameters(shards):
        if id(parameter) not in names:
            raise ArgumentError(
                f"{function}: a parameter of shape {tuple(parameter.shape)} is not sharded now, or not of "
                "this model; register the whole model, before its first forward pass or after reshard()"
            )
        name = names[id(parameter)]
        if parameter.device.type == "meta":
            raise ArgumentError(
                f"{function}: {name} is on the meta device; register when its values are there"
            )
        reduced = policy.reduce_dtype or policy.param_dtype or parameter.dtype
        if parameter.requires_grad and reduced not in GRAD_DTYPES:
            raise DtypeError(
                f"{function}: gradients must be of fp32, bf16 or fp16, those of {name} are of {reduced}"
            )
        both = set(ranks or ()) & set(parameter.device_mesh.mesh.flatten().tolist())
        if ranks is not None and both != {dist.get_rank()}:
            raise ArgumentError(
                f"{function}: group must hold the same shard of different replicas, but shares ranks "
                f"{sorted(both)} with the mesh of {name}"
            )
    known = {id(parameter) for parameter, _ in _parameters(shards)}
    rest = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if rest:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        raise ArgumentError(
            f"{function}: no fully_shard has {', '.join(rest[:3])}{more}, which would drift apart; call it "
            "for the whole model, too, before the hook is registered"
        )


def _parameters(shards: Sequence[Shards]) -> Iterator[tuple[Any, Any]]:
    """Each, and FSDP's policy for it."""
    for each in shards:
        for parameter in each.parameters:
            yield parameter, each.group.mp_policy
