"""`gck.ddp.register` finds what is wrong before a backward pass does, which DDP would not survive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.errors import ArgumentError, DtypeError


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Scale(nn.Module):
    def __init__(self, dtype: torch.dtype, trains: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones((), dtype=dtype), requires_grad=trains)


class Model(nn.Module):
    """A matrix, and a temperature of another dtype."""

    def __init__(self, dtype: torch.dtype, trains: bool = True) -> None:
        super().__init__()
        self.matrix = nn.Linear(64, 64, bias=False)
        self.scale = Scale(dtype, trains)

    def forward(self, x: Tensor) -> Tensor:
        return (self.matrix(x) * self.scale.temperature.float()).square().mean()


def test_what_no_pattern_matches() -> None:
    model = DistributedDataParallel(Model(torch.float32))
    with pytest.raises(ArgumentError, match=r'no pattern of compressor matches .*; "\*" matches the rest'):
        gck.ddp.register(model, {"matrix.*": gck.TopK(ratio=0.1)}, bypass_numel=0, bypass_1d=False)
    state = gck.ddp.register(model, {"matrix.*": gck.TopK(ratio=0.1), "*t*": gck.Sign()})
    assert state.compressors == [gck.TopK(ratio=0.1), gck.Sign()]


def test_gradients_of_other_dtypes_though_bypassed() -> None:
    model = DistributedDataParallel(Model(torch.float64))
    with pytest.raises(DtypeError, match=r"those of scale.temperature are of torch\.float64"):
        gck.ddp.register(model, gck.Sign(), bypass_names=["scale.temperature"])
    model.register_comm_hook(None, lambda _, bucket: bucket)  # type: ignore[arg-type]  # none is registered yet


@pytest.mark.parametrize("ignored", [True, False])
def test_those_that_ddp_does_not_reduce_may_be_of_any(ignored: bool) -> None:
    inner = Model(torch.float64, trains=ignored)
    if ignored:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["scale.temperature"])
    model = DistributedDataParallel(inner)
    state = gck.ddp.register(model, gck.Sign())
    model(torch.ones(2, 64)).backward()
    assert state.step == 1
    assert sorted(state.residuals) == ["matrix.weight"]
    assert (inner.scale.temperature.grad is not None) == ignored


def test_ddp_ignores_parameters_of_the_outermost_module_with_a_dot_in_front() -> None:
    inner = Model(torch.float32)
    inner.register_parameter("outermost", nn.Parameter(torch.ones((), dtype=torch.float64)))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["outermost"])
    with pytest.raises(DtypeError, match="those of outermost are"):
        gck.ddp.register(DistributedDataParallel(inner), gck.Sign())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, [".outermost"])
    model = DistributedDataParallel(inner)
    state = gck.ddp.register(model, gck.Sign())
    (model(torch.ones(2, 64)) * inner.outermost).backward()
    assert state.step == 1


def test_what_is_ignored_at_one_of_its_places_alone_is_reduced() -> None:
    inner = Model(torch.float64)
    inner.other = Scale(torch.float64, trains=True)
    inner.other.temperature = inner.scale.temperature
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["scale.temperature"])
    with pytest.raises(DtypeError, match=r"those of scale.temperature are"):
        gck.ddp.register(DistributedDataParallel(inner), gck.Sign())
