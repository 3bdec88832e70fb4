"""Errors and interrupts in the DDP hook: checks that ddp_worker.py runs, on one model each."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import all_reduce_
from gck.errors import ArgumentError, CollectiveMismatchError, DtypeError, GroupUnusableError
from gck.integrations import ddp
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import TINY_BUCKETS, assert_same_on_all_ranks, loss_of, network, train


def check_register_refuses_what_would_fail_later() -> None:
    model = DistributedDataParallel(network())
    for scaler in (5, "x", object()):
        with pytest.raises(DtypeError, match=r"HookState: scaler must have a get_scale, got "):
            ddp.register(model, Sign(32), scaler=scaler)
    with pytest.raises(ArgumentError, match=r"group must be .* got 'x' \(str\)"):
        ddp.register(model, Sign(32), group="x")
    with pytest.raises(
        ArgumentError, match=r"gck.ddp.register: 0.weight of \d+ elements: TopK: k must be at most"
    ):
        ddp.register(model, TopK(k=1 << 20))
    ddp.register(model, Sign(32), algorithm="two_phase")  # nothing was registered before
    with pytest.raises(ArgumentError, match=r"gck.ddp.register: model has a communication hook already"):
        ddp.register(model, Sign(32))


def check_errors_of_buckets_in_flight() -> None:
    """One bucket of several fails; all ranks say so at the end of the pass, and the group stays usable."""
    model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
    state = ddp.HookState(TopK(ratio=0.3), algorithm="one_phase", model=model, bypass_numel=200)
    hooked = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        names = [state.label(parameter) for parameter in bucket.parameters()]
        hooked.append((names, bucket.is_last()))
        wrong = state.step == 1 and "2.weight" in names and dist.get_rank() == 1
        state.compressor = TopK(ratio=0.4 if wrong else 0.3)
        return ddp.hook(state, bucket)

    model.register_comm_hook(state, hook)
    train(model, range(1))  # one bucket, which DDP then cuts
    hooked.clear()
    before = {name: residuals.worker.clone() for name, residuals in state.residuals.items()}
    with pytest.raises(CollectiveMismatchError, match=r"rank 1 differs .* compressor"):
        loss_of(model, 1).backward()
    assert [last for names, last in hooked if "2.weight" in names] == [False]
    assert hooked[-1][1], "the pass stopped before its last bucket"
    assert state.step == 1
    assert same_bytes(state.residuals["2.weight"].worker, before["2.weight"])
    assert not same_bytes(state.residuals["0.weight"].worker, before["0.weight"])
    state.compressor = TopK(ratio=0.3)
    inner = network()
    inner.load_state_dict(model.module.state_dict())
    again = DistributedDataParallel(inner, bucket_cap_mb=TINY_BUCKETS)
    next_state = ddp.register(again, TopK(ratio=0.3), algorithm="one_phase", bypass_numel=200)
    next_state.load_state_dict(state.state_dict())
    train(again, range(1, 3))
    assert next_state.step == 3
    assert_same_on_all_ranks(list(again.parameters()))


def check_errors_reach_the_training_loop() -> None:
    model = DistributedDataParallel(network())
    # Configurations that the group has not agreed on before, see `handshake.agree`.
    state = ddp.register(model, Sign(512 if dist.get_rank() else 1024), bypass_numel=200)
    with pytest.raises(CollectiveMismatchError, match=r"rank 1 differs .* compressor"):
        loss_of(model, 0).backward()
    assert state.step == 0
    assert all(residuals.worker is None for _, residuals in state.residuals.items())
    # On the same group; DDP itself does not survive.
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        loss_of(model, 0).backward()
    again = DistributedDataParallel(network())
    ddp.register(again, Sign(32), bypass_numel=200)
    loss_of(again, 0).backward()
    assert_same_on_all_ranks([parameter.grad for parameter in again.parameters()])


class Interrupted(Sign):
    """Ctrl-C in the middle of a bucket."""

    def compress_(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        super().compress_(*args, **kwargs)


def check_an_interrupt_reaches_the_training_loop() -> None:
    """On both ranks; nothing has changed, and training goes on with the same residuals on another group."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group = dist.new_group()
    model = DistributedDataParallel(network(), process_group=group)
    state = ddp.register(model, Sign(32), bypass_numel=200, algorithm="two_phase")
    train(model, range(1))
    before = {name: residuals.worker.clone() for name, residuals in state.residuals.items()}
    state.compressor = Interrupted(32)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 1).backward()
    assert state.step == 1
    for name, residuals in state.residuals.items():
        assert same_bytes(residuals.worker, before[name])
    with pytest.raises(GroupUnusableError, match="KeyboardInterrupt"):
        all_reduce_(torch.ones(64), None, Sign(32), group)
    inner = model.module
    del model
    again = DistributedDataParallel(inner, process_group=dist.new_group())
    next_state = ddp.register(again, Sign(32), bypass_numel=200, algorithm="two_phase")
    next_state.load_state_dict(state.state_dict() | {"compressor": repr(Sign(32))})
    train(again, range(1, 2))
    assert next_state.step == 2
    assert_same_on_all_ranks(list(again.parameters()))
