"""One rank of tests/test_ddp.py: every `check_*` below, on one model each."""

from __future__ import annotations

import copy
import io
import os
import signal
import tempfile
import threading
import traceback
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gck.collectives import all_reduce_
from gck.error_feedback import ErrorFeedback
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    GroupUnusableError,
    LayoutError,
    StateMismatchError,
)
from gck.integrations import ddp
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives import launcher

TINY_BUCKETS = 0.004  # MB, as DDP counts them: about one weight a bucket
EVERYTHING: dict[str, Any] = {"bypass_numel": 0, "bypass_1d": False}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 47), nn.Tanh(), nn.Linear(47, 40), nn.Tanh(), nn.Linear(40, 3)).to(
        dtype
    )


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 33, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(batch(step, dtype)).square().mean()


def train(model: nn.Module, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bytes(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def assert_same_on_all_ranks(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.detach().float().view(-1) for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(same_bytes(flat, other) for other in others)


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
            assert same_bytes(residuals.worker, states[1].residuals[name].worker)
            assert same_bytes(residuals.server, states[1].residuals[name].server)
        assert [state.step for state in states] == [4, 4]


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


def check_resume_is_as_if_never_stopped() -> None:
    for compressor in (Sign(32), TopK(ratio=0.05)):
        options: dict[str, Any] = {"warmup_steps": 1, "bypass_numel": 200}
        whole = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
        whole_state = ddp.register(whole, compressor, **options)
        train(whole, range(5))

        first = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
        first_state = ddp.register(first, compressor, **options)
        train(first, range(3))
        file = io.BytesIO()
        torch.save({"model": first.module.state_dict(), "gck": first_state.state_dict()}, file)
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)

        inner = network()
        inner.load_state_dict(checkpoint["model"])
        second = DistributedDataParallel(inner, bucket_cap_mb=TINY_BUCKETS)
        second_state = ddp.register(second, compressor, **options)
        second_state.load_state_dict(checkpoint["gck"])
        assert second_state.step == 3
        train(second, range(3, 5))
        assert equal(whole, second)
        for name, residuals in whole_state.residuals.items():
            assert same_bytes(residuals.worker, second_state.residuals[name].worker)

        # Without the residuals it is another run: the comparison above can fail.
        inner = network()
        inner.load_state_dict(checkpoint["model"])
        forgetful = DistributedDataParallel(inner, bucket_cap_mb=TINY_BUCKETS)
        ddp.register(forgetful, compressor, **(options | {"warmup_steps": 0}))
        train(forgetful, range(3, 5))
        assert not equal(whole, forgetful)


def check_states_that_do_not_fit() -> None:
    model = DistributedDataParallel(network())
    state = ddp.register(model, Sign(32), algorithm="two_phase", **EVERYTHING)
    train(model, range(2))
    saved = state.state_dict()
    assert saved["rank"] == dist.get_rank()
    assert saved["world_size"] == 2
    stranger = ddp.HookState(Sign(32), model=nn.Linear(3, 3))
    with pytest.raises(StateMismatchError, match="no parameter is named"):
        stranger.load_state_dict(saved)
    other = copy.deepcopy(saved)
    for entry in other["residuals"]["tensors"].values():
        entry["rank"] = 7
    before = {name: residuals.worker for name, residuals in state.residuals.items()}
    with pytest.raises(StateMismatchError, match=r"belongs to rank 7"):
        state.load_state_dict(other)
    assert {name: residuals.worker for name, residuals in state.residuals.items()} == before
    assert state.step == 2
    state.load_state_dict(other, reset_server=True)
    assert all(residuals.server is None for _, residuals in state.residuals.items())


def check_states_of_another_step() -> None:
    """The seed of a choice is another one at every step: a state is not of one of them."""
    model = DistributedDataParallel(network())
    state = ddp.register(model, RandomK(ratio=0.5), algorithm="one_phase", **EVERYTHING)
    for step in range(3):
        state.compressor = replace(state.compressor, seed=step)
        train(model, range(step, step + 1))
    saved = copy.deepcopy(state.state_dict())
    later = ddp.HookState(RandomK(ratio=0.5, seed=77), model=model)
    later.load_state_dict(saved)
    assert later.step == 3
    other = ddp.HookState(RandomK(ratio=0.4), model=model)
    with pytest.raises(StateMismatchError, match=r"belongs to compressor RandomK\(ratio=0.5"):
        other.load_state_dict(saved)


def check_states_of_another_rank_world_or_compressor() -> None:
    """Top-k has no server residual that would tell."""
    model = DistributedDataParallel(network())
    state = ddp.register(model, TopK(ratio=0.1), algorithm="one_phase", **EVERYTHING)
    train(model, range(2))
    saved = copy.deepcopy(state.state_dict())
    other = ddp.HookState(TopK(ratio=0.2), model=model)
    for change, text, overridden in (
        ({"rank": 1 - dist.get_rank()}, f"belongs to rank {1 - dist.get_rank()}, this is", False),
        ({"rank": None}, "belongs to rank None", False),
        ({"world_size": 4}, "belongs to world_size 4, this is world_size 2; reset_server", True),
        ({"compressor": "Sign(chunk_size=32)"}, r"belongs to compressor Sign\(.*; reset_server", True),
    ):
        for reset_server in (False, True):
            if reset_server and overridden:
                state.load_state_dict(saved | change, reset_server=True)
            else:
                with pytest.raises(StateMismatchError, match=text):
                    other.load_state_dict(saved | change | {"step": 7}, reset_server=reset_server)
                assert other.step == len(other.residuals) == 0
    # Its own compressor is what counts.
    with pytest.raises(StateMismatchError, match=r"belongs to compressor TopK\(ratio=0.1"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, reset_server=True)
    assert other.step == 2
    assert same_bytes(other.residuals["0.weight"].worker, state.residuals["0.weight"].worker)


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


def check_names_can_come_later() -> None:
    model = DistributedDataParallel(network())
    state = ddp.HookState(Sign(32), bypass_numel=200)
    model.register_comm_hook(state, ddp.hook)
    train(model, range(2))
    with pytest.raises(ArgumentError, match=r"pass model= to HookState"):
        state.state_dict()
    with pytest.raises(ArgumentError, match=r"pass model= to HookState"):
        state.load_state_dict({})
    held = {id(residuals) for _, residuals in state.residuals.items()}
    with pytest.raises(ArgumentError, match=r"model lacks 2 parameters"):
        state.bind(network())
    state.bind(model)
    assert sorted(state.residuals) == ["0.weight", "2.weight"]
    assert {id(residuals) for _, residuals in state.residuals.items()} == held
    train(model, range(2, 3))
    assert len(state.residuals) == 2
    assert sorted(state.state_dict()["residuals"]["tensors"]) == ["0.weight", "2.weight"]


def overflowing(
    model: nn.Module, steps: range, bad: dict[int, int], scaler: torch.amp.GradScaler
) -> list[float]:
    """Trains with a scaled loss that overflows at the steps of `bad` on one rank each; the scale after each
    step."""
    optimizer, scales = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in steps:
        optimizer.zero_grad()
        scale = float("inf") if bad.get(step) == dist.get_rank() else 1.0
        scaler.scale(loss_of(model, step) * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def residual_bytes(state: ddp.HookState) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    return {name: (r.worker, r.server) for name, r in copy.deepcopy(state.residuals).items()}


def check_overflow_is_skipped_by_all_as_if_it_had_not_been() -> None:
    """With scales of powers of two, training is that without scaling and without the steps that overflow."""
    bad = {0: 1, 4: 0, 5: 1}
    for compressor, algorithm in (
        (TopK(ratio=0.1), "one_phase"),
        (Sign(32), "two_phase"),
        (Quantize(4, 32), "two_phase"),
    ):
        options: dict[str, Any] = {"algorithm": algorithm, "bypass_numel": 200}
        plain = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
        plain_state = ddp.register(plain, compressor, **options)
        for step in range(9):
            if step not in bad:
                train(plain, range(step, step + 1))

        model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        state = ddp.register(model, compressor, scaler=scaler, **options)
        scales: list[float] = []
        for step in range(9):
            before, weights = residual_bytes(state), copy.deepcopy(list(model.parameters()))
            scales += overflowing(model, range(step, step + 1), bad, scaler)
            if step in bad:
                assert all(same_bytes(a, b) for a, b in zip(weights, model.parameters(), strict=True))
                for name, kept in residual_bytes(state).items():
                    # In units of the scale at the beginning of the step, which is the first to rescale.
                    for mine, was in zip(kept, before.get(name, (None, None)), strict=True):
                        assert (mine is None) == (was is None)
                        factor = state.scale / (scales[step - 2] if step == 5 else state.scale)
                        assert mine is None or was is None or same_bytes(mine, was * factor)
        # Halved at the overflows, doubled after two good steps.
        assert [scale / 2**10 for scale in scales] == [0.5, 0.5, 1, 1, 0.5, 0.25, 0.25, 0.5, 0.5]
        assert (state.step, state.skipped) == (9, 3)
        assert equal(plain, model)
        state.set_scale(1.0)
        for name, residuals in plain_state.residuals.items():
            assert same_bytes(residuals.worker, state.residuals[name].worker)
            assert residuals.server is None or same_bytes(residuals.server, state.residuals[name].server)

        # Without the scaler it is another training: the comparison above can fail.
        model = DistributedDataParallel(network(), bucket_cap_mb=TINY_BUCKETS)
        ddp.register(model, compressor, **options)
        overflowing(model, range(9), bad, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
        assert not equal(plain, model)


def check_scale_survives_a_checkpoint() -> None:
    """Residuals and scaler are saved after an update of the scale that no step has followed yet."""

    def fresh() -> tuple[nn.Module, ddp.HookState, torch.amp.GradScaler]:
        model = DistributedDataParallel(network())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return (
            model,
            ddp.register(model, Sign(32), algorithm="two_phase", scaler=scaler, **EVERYTHING),
            scaler,
        )

    whole, whole_state, whole_scaler = fresh()
    overflowing(whole, range(6), {}, whole_scaler)
    first, first_state, first_scaler = fresh()
    overflowing(first, range(4), {}, first_scaler)
    assert first_scaler.get_scale() != first_state.scale
    with tempfile.TemporaryDirectory() as directory:
        first_state.save(directory, shared=False)
        for through_disk in (True, False):
            second, second_state, second_scaler = fresh()
            second.load_state_dict(first.state_dict())
            second_scaler.load_state_dict(first_scaler.state_dict())
            if through_disk:
                assert second_state.load(directory, step=4, shared=False) is not None
            else:
                second_state.load_state_dict(first_state.state_dict())
            assert (second_state.step, second_state.scale) == (4, first_state.scale)
            overflowing(second, range(4, 6), {}, second_scaler)
            assert equal(whole, second)
            assert same_bytes(
                whole_state.residuals["0.weight"].server, second_state.residuals["0.weight"].server
            )


def check_states_on_disk() -> None:
    paths: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(paths)
    model = DistributedDataParallel(network())
    options: dict[str, Any] = {"algorithm": "two_phase"} | EVERYTHING
    state = ddp.register(model, Sign(32), **options)
    for step in range(3):
        train(model, range(step, step + 1))
        state.save(paths[0])
    dist.barrier()
    fresh = ddp.HookState(Sign(32), model=model, **options)
    loaded = fresh.load(paths[0])
    assert loaded is not None
    assert (loaded.step, fresh.step, loaded.world_size) == (3, 3, 2)
    for name, residuals in state.residuals.items():
        assert same_bytes(residuals.worker, fresh.residuals[name].worker)
        assert same_bytes(residuals.server, fresh.residuals[name].server)
    with pytest.raises(StateMismatchError, match=r"saved by compressor Sign\(.*this is TopK\("):
        ddp.HookState(TopK(ratio=0.1), model=model).load(paths[0])
    with pytest.raises(StateMismatchError, match="no parameter is named"):
        ddp.HookState(Sign(32), model=nn.Linear(3, 3)).load(paths[0])
    # One rank of its own group goes on alone, with what all of them owe.
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    alone = ddp.HookState(TopK(ratio=0.1), model=model, group=own)
    with pytest.raises(StateMismatchError, match="step 3 was saved by 2 ranks, this world has 1"):
        alone.load(paths[0], server="fold")
    assert (alone.step, len(alone.residuals)) == (0, 0)
    dist.barrier()
    assert alone.load(paths[0], reshard=True, server="fold") is not None
    assert sorted(alone.residuals) == sorted(state.residuals)


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


if __name__ == "__main__":
    directory, rank, _ = launcher.init()
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                results[name] = "passed"
            except BaseException:
                results[name] = traceback.format_exc()
                break  # ranks may be out of step now
    launcher.report(directory, rank, results)
    launcher.leave()
