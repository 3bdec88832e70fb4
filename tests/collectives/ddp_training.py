"""Training with the DDP hook, on every rank alike: checks that ddp_worker.py runs, on one model each."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import LayoutError
from gck.integrations import ddp
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import (
    EVERYTHING,
    TINY_BUCKETS,
    assert_same_on_all_ranks,
    equal,
    loss_of,
    network,
    train,
)
from tests.collectives.ddp_unused import residuals_of_unused_parameters_stay


def check_mean_is_taken_once_and_buckets_are_rebuilt() -> None:
    """With every entry kept, compression is a dense all-reduce: the same bits as DDP without a hook."""
    for options in ({}, {"gradient_as_bucket_view": True}):
        dense = DistributedDataParallel(network(), **options)
        packed = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS, **options)
        state = ddp.HookState(TopK(ratio=1.0), algorithm="one_phase", model=packed, **EVERYTHING)
        layouts: list[list[tuple[int, ...]]] = [[]]

        # Not annotated: DDP would compare the text that annotations are here.
        def hook(state, bucket, layouts=layouts):  # type: ignore[no-untyped-def]
            layouts[-1].append(tuple(p.numel() for p in bucket.parameters()))
            if bucket.is_last():
                layouts.append([])
            return ddp.hook(state, bucket)

        packed.register_comm_hook(state, hook)
        train(dense, range(4))
        train(packed, range(4))
        assert equal(dense, packed)
        assert len(layouts[1]) > 1, "one bucket only"
        assert layouts[0] != layouts[1], "buckets were not rebuilt"
        assert state.step == 4


def check_options_of_ddp_make_no_difference() -> None:
    models, states = [], []
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        models.append(DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS, **options))
        states.append(ddp.register(models[-1], TopK(ratio=0.1), algorithm="one_phase", **EVERYTHING))
        train(models[-1], range(4))
    assert all(equal(models[0], model) for model in models)
    assert [state.step for state in states] == [4, 4, 4]
    for name, residuals in states[0].residuals.items():
        assert all(same_bytes(residuals.worker, state.residuals[name].worker) for state in states)


def check_residuals_are_kept_by_name() -> None:
    model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
    state = ddp.register(model, Sign(32), algorithm="two_phase", bypass_numel=200)
    # The same without DDP: each parameter reduced alone, in any bucket or none.
    twin = network()
    states = {name: ErrorFeedback() for name, _ in twin.named_parameters()}
    for step in range(4):
        model.zero_grad()
        loss_of(model, step).backward()
        twin.zero_grad()
        loss_of(twin, step).backward()
        for (name, parameter), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            small = parameter.numel() <= 200 or parameter.dim() < 2
            algorithm = "dense" if small else "two_phase"
            all_reduce_(parameter.grad, states[name], Sign(32), algorithm=algorithm)
            assert same_bytes(parameter.grad, theirs.grad), name
    # 47 * 33 and 40 * 47 elements; the last weight has 120, the others are biases.
    assert sorted(state.residuals) == ["0.weight", "2.weight"]
    for name, residuals in state.residuals.items():
        assert residuals.worker is not None
        assert residuals.worker.any()
        assert same_bytes(residuals.worker, states[name].worker)
        assert same_bytes(residuals.server, states[name].server)
    assert_same_on_all_ranks(list(model.parameters()))


def check_compressors_by_name() -> None:
    """In buckets of any make, with overlap: each parameter as if reduced alone by its own compressor."""
    given = {"0.weight": TopK(ratio=0.1), "2.*": Sign(32), "*": TopK(ratio=0.5)}
    chosen = [TopK(ratio=0.1), TopK(ratio=0.5), Sign(32), Sign(32), TopK(ratio=0.5), TopK(ratio=0.5)]
    for cap in (TINY_BUCKETS, 25):
        model = DistributedDataParallel(network(), bucket_cap_mb=cap)
        ddp.register(model, given, **EVERYTHING)
        twin = network()
        states = [ErrorFeedback() for _ in twin.parameters()]
        for step in range(3):
            model.zero_grad()
            loss_of(model, step).backward()
            twin.zero_grad()
            loss_of(twin, step).backward()
            for parameter, theirs, own, compressor in zip(
                twin.parameters(), model.parameters(), states, chosen, strict=True
            ):
                assert parameter.grad is not None
                all_reduce_(parameter.grad, own, compressor)
                assert same_bytes(parameter.grad, theirs.grad)


def check_warm_up_is_dense() -> None:
    dense, packed = DistributedDataParallel(network()), DistributedDataParallel(network())
    state = ddp.register(packed, Sign(32), warmup_steps=2, **EVERYTHING)
    train(dense, range(2))
    train(packed, range(2))
    assert equal(dense, packed)
    assert len(state.residuals) == 0
    train(dense, range(2, 3))
    train(packed, range(2, 3))
    assert not equal(dense, packed)
    assert state.step == 3
    assert len(state.residuals) == 6


def check_no_sync() -> None:
    """Error feedback sees the accumulated gradient, once."""
    model, twin = DistributedDataParallel(network()), network()
    state = ddp.register(model, TopK(ratio=0.1), algorithm="one_phase", **EVERYTHING)
    states = [ErrorFeedback() for _ in twin.parameters()]
    for step in range(2):
        model.zero_grad()
        with model.no_sync():
            loss_of(model, 10 + step).backward()
            assert state.step == step
            assert step or len(state.residuals) == 0
        loss_of(model, 20 + step).backward()
        assert state.step == step + 1
        twin.zero_grad()
        loss_of(twin, 10 + step).backward()
        loss_of(twin, 20 + step).backward()
        for parameter, theirs, own in zip(twin.parameters(), model.parameters(), states, strict=True):
            assert parameter.grad is not None
            all_reduce_(parameter.grad, own, TopK(ratio=0.1), algorithm="one_phase")
            assert same_bytes(parameter.grad, theirs.grad)


def check_low_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, twin = DistributedDataParallel(network(dtype)), network(dtype)
        ddp.register(model, Sign(64), algorithm="two_phase", **EVERYTHING)
        loss_of(model, 0, dtype).backward()
        loss_of(twin, 0, dtype).backward()
        for parameter, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            all_reduce_(parameter.grad, ErrorFeedback(), Sign(64), algorithm="two_phase")
            assert theirs.grad.dtype == dtype
            assert same_bytes(parameter.grad, theirs.grad)


def check_overlap_makes_no_difference() -> None:
    """Many buckets, some of them dense; DDP sends by the group itself where parameters may be unused."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = network(), nn.Linear(33, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    for make, options in ((network, {}), (Sometimes, {"find_unused_parameters": True})):
        models, states, threads = [], [], []
        for overlap in (False, True):  # and without checksums, and with
            models.append(DistributedDataParallel(make(), bucket_cap_mb=TINY_BUCKETS, **options))
            states.append(
                ddp.register(
                    models[-1],
                    Sign(32),
                    algorithm="two_phase",
                    bypass_numel=200,
                    bypass_1d=False,
                    overlap=overlap,
                    checksum=overlap,
                )
            )
            started = []

            class Counted(Sign):
                def compress_(self, *args: Any, _started: list[str] = started, **kwargs: Any) -> None:
                    _started.append(threading.current_thread().name)
                    super().compress_(*args, **kwargs)

            states[-1].compressor = Counted(32)
            train(models[-1], range(4))
            threads.append(set(started))
        assert "gck collectives" not in threads[0]
        assert "gck collectives" in threads[1]
        assert equal(*models)
        assert sorted(states[0].residuals) == sorted(states[1].residuals)
        for name, residuals in states[0].residuals.items():
            if "unused" in name:
                assert residuals.worker is residuals.server is None
                continue
            assert same_bytes(residuals.worker, states[1].residuals[name].worker)
            assert same_bytes(residuals.server, states[1].residuals[name].server)
        assert [state.step for state in states] == [4, 4]


def check_residuals_of_unused_parameters_stay() -> None:
    residuals_of_unused_parameters_stay(dist.group.WORLD, torch.device("cpu"))


def check_inputs_that_end_on_one_rank_first() -> None:
    """Under DDP's join, ranks without inputs send what is left in their residuals."""
    model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
    state = ddp.register(model, TopK(ratio=0.1), **EVERYTHING)
    twin, states = network(), ErrorFeedbackMap()
    with model.join():
        train(model, range(2 + dist.get_rank()))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(twin, step)
        (loss if step < 2 + dist.get_rank() else 0 * loss).backward()
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            all_reduce_(parameter.grad, states[name], TopK(ratio=0.1))
        if step < 2 + dist.get_rank():
            optimizer.step()
    if dist.get_rank() == 1:
        assert equal(model, twin)
    assert_same_on_all_ranks(list(model.parameters()))
    for name, residuals in states.items():
        if name != "4.bias":  # of three elements, which go dense
            assert same_bytes(residuals.worker, state.residuals[name].worker), name


def check_no_overlap_with_what_sends_in_the_backward_pass() -> None:
    plain, normed = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3))
    assert ddp.HookState(Sign(32), model=plain).overlaps()
    assert not ddp.HookState(Sign(32), model=plain, overlap=False).overlaps()
    assert not ddp.HookState(Sign(32), model=normed).overlaps()
    assert not ddp.HookState(Sign(32)).overlaps()


def check_channels_last() -> None:
    """Gradients whose memory order is not that of their indices."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)

    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    dense, packed = DistributedDataParallel(make()), DistributedDataParallel(make())
    ddp.register(packed, TopK(ratio=1.0), algorithm="one_phase", **EVERYTHING)
    for model in (dense, packed):
        model(images.to(memory_format=torch.channels_last)).square().mean().backward()
    for a, b in zip(dense.parameters(), packed.parameters(), strict=True):
        assert same_bytes(a.grad, b.grad)


def check_group_is_that_of_the_model() -> None:
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model, twin = DistributedDataParallel(network(), process_group=own), network()
    state = ddp.HookState(TopK(ratio=1.0), algorithm="one_phase", model=model, **EVERYTHING)
    model.register_comm_hook(state, ddp.hook)
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    assert state.state_dict()["world_size"] == 1
    for parameter, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert same_bytes(parameter.grad, theirs.grad)
    other = ddp.HookState(TopK(ratio=1.0), model=model, group=dist.group.WORLD)
    assert other.state_dict()["world_size"] == 2


def check_sparse_gradients_are_refused() -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Embedding(50, 40, sparse=True), nn.Linear(40, 3)))
    ddp.register(model, TopK(ratio=0.1))
    with pytest.raises(LayoutError, match=r"sparse gradient \(torch.sparse_coo\) of 0.weight"):
        model(torch.arange(5)).sum().backward()
