"""One rank of test_torch_gpu.py: every `check_*` below over torch's own NCCL. Ranks may share a GPU.

Where there is none, gloo stands in, which shows that the checks themselves are right.
"""

from __future__ import annotations

import copy
import os
import threading
import traceback
from typing import Any

from bench.nccl.one_device import environment

if __name__ == "__main__":
    # The workspaces of cuBLAS: with these it gives the same bits on every stream.
    os.environ |= {**environment(int(os.environ["RANK"])), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.collectives import all_reduce_, resolve
from gck.error_feedback import ErrorFeedback
from gck.errors import CorruptPayloadError
from gck.integrations import ddp
from tests.cases import same_bytes
from tests.collectives import launcher, scenarios
from tests.collectives.ddp_model import EVERYTHING, TINY_BUCKETS, batch, equal, network
from tests.collectives.ddp_unused import residuals_of_unused_parameters_stay
from tests.nccl.gpu_worker import on_device

STEPS = 4


def model_on(device: torch.device, group: Any) -> DistributedDataParallel:
    return DistributedDataParallel(network().to(device), process_group=group, bucket_cap_mb=TINY_BUCKETS)


def loss_of(model: nn.Module, step: int, device: torch.device) -> Tensor:
    return model(batch(step).to(device)).square().mean()


def residuals_of(state: ddp.HookState) -> dict[str, list[Tensor]]:
    return {
        name: [buffer.clone() for buffer in (own.worker, own.server) if buffer is not None]
        for name, own in state.residuals.items()
    }


def same_residuals(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        same_bytes(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)
    )


def check_collectives(group: Any, device: torch.device) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        "scenarios": scenarios.run(rank, world_size, group),
        "on_device": on_device(rank, group, device),
        "in_flight": on_device(rank, group, device, in_flight=True),
    }


def check_checksums(group: Any, device: torch.device) -> None:
    """Nothing changes; and a bit that flips on its way to rank 1 is found by both."""
    transports: list[Any] = [copy.copy(resolve(group))]
    if device.type == "cuda":
        transports.append(gck.NcclCommunicator.from_group(timeout=60))
    for transport in transports:
        for compressor, algorithm in ((gck.Sign(64), "two_phase"), (gck.TopK(ratio=0.1), "one_phase")):
            found = []
            for checksum in (False, True):
                grad, state = scenarios.gradient(dist.get_rank(), 5000).to(device), ErrorFeedback()
                options = {"algorithm": algorithm, "checksum": checksum}
                all_reduce_(grad, state, compressor, transport, **options)
                found.append([grad, state.worker])
            assert all(same_bytes(a, b) for a, b in zip(*found, strict=True)), (transport, algorithm)
        damage_is_found(transport, device)
    for transport in transports[1:]:
        transport.close()


def damage_is_found(transport: Any, device: torch.device) -> None:
    inner = transport.all_to_all_bytes

    def damaged(send: Tensor) -> Tensor:
        rows = inner(send)
        transport.synchronize()
        if dist.get_rank() == 1:
            rows[0, 3] ^= 4
        return rows

    transport.all_to_all_bytes = damaged
    grad, state = scenarios.gradient(dist.get_rank(), 5000).to(device), ErrorFeedback()
    before = grad.clone()
    with pytest.raises(CorruptPayloadError, match="from rank 0 to rank 1 was damaged"):
        all_reduce_(grad, state, gck.Sign(64), transport, algorithm="two_phase", checksum=True)
    assert same_bytes(grad, before)
    del transport.all_to_all_bytes
    all_reduce_(grad, state, gck.Sign(64), transport, algorithm="two_phase", checksum=True)


def check_ddp_overlap_makes_no_difference(group: Any, device: torch.device) -> None:
    """Nor does it whether messages go by DDP's own group or by a communicator of gck's."""
    models, states, threads = [], [], []
    ways: list[tuple[bool, Any]] = [(False, group), (True, group)]
    if device.type == "cuda":
        ways.append((True, gck.NcclCommunicator.from_group(timeout=60)))
    for overlap, by in ways:
        started: set[str] = set()

        class Counted(gck.Sign):
            def compress_(self, *args: Any, _started: set[str] = started, **kwargs: Any) -> None:
                _started.add(threading.current_thread().name)
                super().compress_(*args, **kwargs)

        models.append(model_on(device, group))
        options = {"algorithm": "two_phase", "overlap": overlap, "group": by, **EVERYTHING}
        states.append(ddp.register(models[-1], Counted(32), **options))
        optimizer = torch.optim.SGD(models[-1].parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(models[-1], step, device).backward()
            optimizer.step()
        threads.append(started)
    assert ["gck collectives" in names for names in threads] == [overlap for overlap, _ in ways]
    for model, state in zip(models[1:], states[1:], strict=True):
        assert equal(models[0], model)
        assert same_residuals(residuals_of(states[0]), residuals_of(state))
        assert all(own.worker.device.type == device.type for _, own in state.residuals.items())
    for _, by in ways[2:]:
        by.close()


def check_a_step_that_the_scaler_skips(group: Any, device: torch.device) -> None:
    """On rank 1 alone the loss overflows; both put their residuals back, and both follow the scale."""
    model = model_on(device, group)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
    state = ddp.register(model, gck.Sign(32), algorithm="two_phase", scaler=scaler, **EVERYTHING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        residuals, weights = residuals_of(state), [weight.detach().clone() for weight in model.parameters()]
        optimizer.zero_grad()
        loss = loss_of(model, step, device)
        bad = step == 2
        if bad and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert state.skipped == (step >= 2)
        assert same_residuals(residuals_of(state), residuals) == bad
        moved = [not same_bytes(a, b) for a, b in zip(model.parameters(), weights, strict=True)]
        assert any(moved) != bad
    assert state.step == STEPS
    assert (scaler.get_scale(), state.scale) == (512.0, 512.0)


def check_residuals_of_unused_parameters_stay(group: Any, device: torch.device) -> None:
    residuals_of_unused_parameters_stay(group, device)


if __name__ == "__main__":
    directory, _, _ = launcher.init(timeout=120)
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
    else:
        device, group = torch.device("cpu"), dist.group.WORLD
    results: dict[str, Any] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                results[name] = check(group, device) or "passed"
            except BaseException:
                results[name] = traceback.format_exc()
                break  # ranks may be out of step now
    launcher.report(directory, dist.get_rank(), results)
    launcher.leave()
