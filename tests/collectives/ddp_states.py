"""States of the DDP hook, saved, loaded and rescaled: checks that ddp_worker.py runs, on one model each."""

from __future__ import annotations

import copy
import io
import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gck.errors import ArgumentError, StateMismatchError
from gck.integrations import ddp
from gck.kernels.low_rank import LowRank
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK
from tests.cases import same_bytes
from tests.collectives.ddp_model import EVERYTHING, TINY_BUCKETS, equal, loss_of, network, train


def check_resume_is_as_if_never_stopped() -> None:
    for compressor in (Sign(32), TopK(ratio=0.05), LowRank(rank=2)):
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
