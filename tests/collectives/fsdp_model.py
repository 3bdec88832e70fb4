"""Two replicas of a model, each sharded over two ranks: what the checks of the FSDP hook have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gck.compressor import Compressor
from gck.kernels.low_rank import LowRank
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives import ddp_model

BY_NAME: dict[str, Compressor | None] = {
    "0.weight": TopK(ratio=0.1),
    "2.weight": LowRank(rank=2),
    "4.*": None,
    "*": Sign(32),
}
MESH: list[DeviceMesh] = []


def mesh() -> DeviceMesh:
    if not MESH:
        device = torch.get_default_device().type
        MESH.append(init_device_mesh(device, (2, 2), mesh_dim_names=("replica", "shard")))
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
    generator = torch.Generator("cpu").manual_seed(10 * step + dist.get_rank())
    inputs = torch.randn(4, 33, generator=generator, device="cpu")
    return model(inputs.to(torch.get_default_device(), dtype)).square().mean()


def train(model: nn.Module, steps: range) -> None:
    ddp_model.train(model, steps, loss_of)


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
