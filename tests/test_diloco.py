"""Exchanges after many local steps: by the bytes of what is said of them, step by step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    DtypeError,
    GroupUnusableError,
    LayoutError,
    PeerLostError,
    StateMismatchError,
)
from gck.integrations import diloco
from tests.cases import same_bytes
from tests.collectives.fragile import Fragile

ROUNDS, LOCAL, WORLD = 4, 3, 3
SIGNS = gck.Sign(chunk_size=32)


class Model(nn.Module):
    """A matrix, its bias, a kernel that lies in memory with channels last, and what does not train."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Linear(40, 50)
        self.kernel = nn.Conv2d(8, 8, 5, bias=False).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.to(dtype)


def nesterov(shared: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)


def wander(model: nn.Module, rank: int, step: int) -> None:
    """A local step, another one on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def contents(outer: Any, model: nn.Module) -> list[Tensor]:
    """All that an exchange changes, copied."""
    saved = outer.state_dict()
    momenta = [entry["momentum_buffer"] for entry in saved["optimizer"]["state"].values()]
    left = [each for _, state in outer.state.residuals.items() for each in (state.worker, state.server)]
    tensors = [*model.parameters(), *saved["shared"].values(), *momenta, *left]
    return [each.detach().clone() for each in tensors if each is not None]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(same_bytes(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressor", [SIGNS, gck.TopK(ratio=0.1), gck.LowRank(rank=2)], ids=str)
def test_an_exchange_is_an_outer_step_by_the_average_change(compressor: Any, dtype: torch.dtype) -> None:
    def rank_main(member: SimulatedMember) -> list[Tensor]:
        model = Model(dtype)
        outer = gck.diloco.OuterOptimizer(model, compressor, LOCAL, optimizer=nesterov, group=member)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shared = {name: p.detach().float().clone() for name, p in trained.items()}
        momenta = {name: torch.zeros_like(each) for name, each in shared.items()}
        states = {name: gck.ErrorFeedback() for name in shared}
        frozen = [p.clone() for p in model.frozen.parameters()]
        for step in range(ROUNDS * LOCAL):
            wander(model, member.rank, step)
            done = outer.step()
            assert done == (step % LOCAL == LOCAL - 1)
            if not done:
                continue
            # The same again, by hand.
            again = Model(dtype)
            with torch.no_grad():
                for name, own in again.named_parameters():
                    if name in shared:
                        own.copy_(shared[name])
            for local in range(step - LOCAL + 1, step + 1):
                wander(again, member.rank, local)
            for name, own in again.named_parameters():
                if name not in shared:
                    continue
                now = own.detach().float()
                change = shared[name].to(dtype).float() - now
                order = (0, 2, 3, 1) if own.dim() == 4 else tuple(range(own.dim()))
                if name == "matrix.bias":
                    gck.all_reduce_(change, gck.ErrorFeedback(), SIGNS, member, algorithm="dense")
                else:
                    lying = change.permute(order).contiguous()
                    gck.all_reduce_(lying, states[name], compressor, member)
                    change = lying.permute([order.index(dim) for dim in range(own.dim())])
                momenta[name].mul_(0.9).add_(change)
                shared[name] -= 0.7 * (change + 0.9 * momenta[name])
                torch.testing.assert_close(
                    outer.state_dict()["shared"][name], shared[name], rtol=2e-6, atol=2e-6
                )
                shared[name].copy_(outer.state_dict()["shared"][name])  # rounding apart, of SGD's own order
                assert same_bytes(trained[name].detach(), shared[name].to(dtype))
                if name != "matrix.bias":
                    left = outer.state.residuals[name].worker
                    assert left is not None
                    assert states[name].worker is not None
                    assert same_bytes(left, states[name].worker)
        assert outer.state.step == ROUNDS
        assert all(same_bytes(p, old) for p, old in zip(model.frozen.parameters(), frozen, strict=True))
        return [p.detach() for p in model.parameters()]

    first, *others = SimulatedGroup(WORLD, timeout=30).run(rank_main)
    assert all(equal(first, other) for other in others)


def test_without_compression_and_momentum_it_is_the_mean_of_the_parameters() -> None:
    def rank_main(member: SimulatedMember) -> tuple[Tensor, Tensor]:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=member, algorithm="dense")
        wander(model, member.rank, 0)
        before = model.matrix.weight.detach().clone()
        assert outer.step()
        return before, model.matrix.weight.detach()

    found = SimulatedGroup(WORLD, timeout=30).run(rank_main)
    mean = torch.stack([before for before, _ in found]).mean(0)
    for _, after in found:
        torch.testing.assert_close(after, mean, rtol=0, atol=1e-6)


def test_an_exchange_that_fails_changes_nothing_and_can_be_tried_again() -> None:
    def rank_main(member: SimulatedMember, others: SimulatedGroup) -> None:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, LOCAL, optimizer=nesterov, group=member)
        for step in range(LOCAL):
            wander(model, member.rank, step)
            outer.step()
        wander(model, member.rank, LOCAL)
        sound, before = outer.state.compressor, contents(outer, model)
        outer.state.compressor = Fragile(SIGNS, 2 if member.rank == 1 else 0)
        with pytest.raises((MemoryError, PeerLostError)):
            outer.synchronize()
        assert equal(contents(outer, model), before)
        with pytest.raises(GroupUnusableError):
            outer.synchronize()
        assert equal(contents(outer, model), before)
        outer.state.compressor, outer.state.group = sound, others.members[member.rank]
        outer.synchronize()
        assert outer.state.step == 2
        assert not equal(contents(outer, model), before)

    SimulatedGroup(WORLD, timeout=30).run(rank_main, SimulatedGroup(WORLD, timeout=30))


def test_those_that_are_left_go_on_without_server_residuals() -> None:
    """As docs/local_steps.md says; ranks that move up keep their worker residuals."""

    def rank_main(member: SimulatedMember, fewer: SimulatedGroup) -> None:
        model = Model()
        options: dict[str, Any] = {"algorithm": "two_phase", "group": member}
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, **options)
        wander(model, member.rank, 0)
        outer.step()
        if member.rank == 0:
            return
        outer.state.group = fewer.members[member.rank - 1]
        wander(model, member.rank, 1)
        before = contents(outer, model)
        with pytest.raises(StateMismatchError, match="server residual: belongs to"):
            outer.step()
        assert equal(contents(outer, model), before)
        for _, left in outer.state.residuals.items():
            left.server = left.binding = None
        outer.step()
        assert outer.state.step == 2

    SimulatedGroup(WORLD, timeout=30).run(rank_main, SimulatedGroup(WORLD - 1, timeout=30))


def test_it_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """The same bits as without a break, also on a rank that has what another one saved of what is shared."""

    def made(member: SimulatedMember) -> tuple[Model, Any]:
        model = Model()
        options: dict[str, Any] = {"optimizer": nesterov, "group": member}
        return model, gck.diloco.OuterOptimizer(model, gck.RandomK(ratio=0.2), LOCAL, **options)

    def train(member: SimulatedMember, model: Model, outer: Any, steps: range) -> None:
        for step in steps:
            wander(model, member.rank, step)
            outer.step()

    def rank_main(member: SimulatedMember) -> None:
        model, outer = made(member)
        train(member, model, outer, range(2 * LOCAL))
        torch.save(outer.state_dict(), tmp_path / f"{member.rank}.pt")
        outer.state.save(tmp_path)
        train(member, model, outer, range(2 * LOCAL, 4 * LOCAL))
        member.barrier()

        other, again = made(member)
        wander(other, member.rank, 0)  # lost
        again.step()
        again.load_state_dict(torch.load(tmp_path / f"{(member.rank + 1) % WORLD}.pt"))
        assert again.local_steps == 0
        loaded = again.state.load(tmp_path, step=again.state.step)
        assert loaded is not None
        train(member, other, again, range(2 * LOCAL, 4 * LOCAL))
        assert again.state.step == 4
        assert equal(contents(again, other), contents(outer, model))

    SimulatedGroup(WORLD, timeout=30).run(rank_main)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, member = Model(), SimulatedGroup(1).members[0]
    outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, optimizer=nesterov, group=member)
    wander(model, 0, 0)
    outer.step()
    before, saved = contents(outer, model), copy.deepcopy(outer.state_dict())
    name = "matrix.weight"
    cases: list[tuple[Any, str]] = [
        ([], "state must be a dict"),
        (saved | {"version": 9}, "state must have version"),
        (saved | {"step": -1}, "step must be an int >= 0, got -1"),
        (saved | {"shared": None}, "shared must be a dict of tensors, got None"),
        (saved | {"shared": [[1]]}, "shared must be a dict of tensors, got "),
        (
            saved | {"shared": {name: saved["shared"][name]}},
            "has not, or too many, of kernel.weight, matrix.b",
        ),
        (saved | {"shared": saved["shared"] | {name: torch.ones(3)}}, r"float32 of shape \(50, 40\), got"),
        (saved | {"shared": saved["shared"] | {name: None}}, "matrix.weight must be float32"),
        (saved | {"optimizer": {}}, "not of this outer optimizer"),
        (
            saved | {"optimizer": torch.optim.SGD([torch.zeros(1)]).state_dict()},
            "not of this outer optimizer",
        ),
        ({k: v for k, v in saved.items() if k != "optimizer"}, "not of this outer optimizer: 'optimizer'"),
    ]
    for state, text in cases:
        with pytest.raises(StateMismatchError, match=text):
            outer.load_state_dict(state)
        assert equal(contents(outer, model), before)
        assert outer.state.step == 1


def test_ranks_that_start_from_other_parameters_are_told() -> None:
    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        if member.rank == 2:
            wander(model, 2, 0)
        with pytest.raises(
            CollectiveMismatchError, match=r"matrix.weight of rank 2 of the group is not that of"
        ):
            gck.diloco.OuterOptimizer(model, SIGNS, 1, group=member)

    SimulatedGroup(WORLD, timeout=30).run(rank_main)


def test_ranks_that_would_exchange_at_other_steps_are_told() -> None:
    def rank_main(member: SimulatedMember) -> None:
        with pytest.raises(CollectiveMismatchError, match=r"ranks have different sync_every: \[5, 5, 7\]"):
            gck.diloco.OuterOptimizer(Model(), SIGNS, 7 if member.rank == 2 else 5, group=member)

    SimulatedGroup(WORLD, timeout=30).run(rank_main)


@pytest.mark.parametrize("differ", ["exchanges", "optimizer", "loaded"])
def test_ranks_that_have_drifted_apart_are_told_before_they_exchange(differ: str) -> None:
    """As after an exchange that has ended on some ranks and failed on others, of which those may not know."""

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        rate = 0.5 if differ == "optimizer" and member.rank == 1 else 1.0
        options: dict[str, Any] = {"optimizer": lambda shared: torch.optim.SGD(shared, lr=rate)}
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=member, **options)
        wander(model, member.rank, 0)
        saved = copy.deepcopy(outer.state_dict())
        outer.step()
        if differ == "exchanges" and member.rank == 1:
            outer.state.step = 2
        if differ == "loaded" and member.rank == 1:
            outer.load_state_dict(saved | {"step": 1})
        wander(model, member.rank, 1)
        before = contents(outer, model)
        what = r"numbers of exchanges: \[1, 2, 1\]" if differ == "exchanges" else "parameters in common: "
        with pytest.raises(CollectiveMismatchError, match=rf"different {what}.*; load the same state_dict"):
            outer.step()
        assert equal(contents(outer, model), before)
        outer.load_state_dict(saved)  # and the group stays usable
        wander(model, member.rank, 1)
        outer.step()
        assert outer.state.step == 1

    SimulatedGroup(WORLD, timeout=30).run(rank_main)


def replace_all(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_one(model: Any) -> None:
    model.matrix = nn.Linear(40, 50)


def freeze(model: Any) -> None:
    model.matrix.bias.requires_grad_(False)


def unfreeze(model: Any) -> None:
    model.frozen.weight.requires_grad_()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replace_all, "kernel.weight, matrix.bias, matrix.weight"),
        (replace_one, "matrix.bias, matrix.weight"),
        (freeze, "matrix.bias"),
        (unfreeze, "frozen.weight"),
    ],
)
def test_parameters_that_change_behind_its_back(change: Callable[[Any], None], name: str) -> None:
    model, member = Model(), SimulatedGroup(1).members[0]
    outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=member)
    change(model)
    with pytest.raises(ArgumentError, match=f": {name} of the model came, went, froze or was replaced"):
        outer.step()


def test_it_is_not_copied() -> None:
    outer = gck.diloco.OuterOptimizer(Model(), SIGNS, 1, group=SimulatedGroup(1).members[0])
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(ArgumentError, match=r"cannot be copied or pickled; save state_dict\(\)"):
            copied(outer)


@pytest.mark.parametrize("where", ["prepare_groups", "check_same"])
def test_ctrl_c_gives_the_group_up(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, before its part of the exchange: peers wait for that."""
    plain = getattr(diloco, where)

    def interrupted(*given: Any) -> Any:
        transport = next(each for each in given if isinstance(each, SimulatedMember))
        if transport.rank == 0 and "synchronize" in given[0]:
            raise KeyboardInterrupt
        return plain(*given)

    def rank_main(member: SimulatedMember) -> None:
        model = Model()
        outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, optimizer=nesterov, group=member)
        wander(model, member.rank, 0)
        before = contents(outer, model)
        if member.rank == 0:
            with pytest.raises(KeyboardInterrupt):
                outer.step()
            with pytest.raises(GroupUnusableError, match=r"KeyboardInterrupt in gck\.diloco"):
                member.barrier()
        else:
            with pytest.raises(PeerLostError, match=r"KeyboardInterrupt in gck\.diloco"):
                outer.step()
        assert equal(contents(outer, model), before)

    monkeypatch.setattr(diloco, where, interrupted)
    SimulatedGroup(WORLD, timeout=30).run(rank_main)


def test_an_outer_optimizer_that_fails_to_load_is_put_back() -> None:
    class HalfWay(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            if state_dict["param_groups"][0]["lr"] == 9.0:
                raise RuntimeError("no such rate")

    options: dict[str, Any] = {"optimizer": lambda shared: HalfWay(shared, lr=1.0)}
    outer = gck.diloco.OuterOptimizer(Model(), SIGNS, 1, group=SimulatedGroup(1).members[0], **options)
    saved = copy.deepcopy(outer.state_dict())
    saved["optimizer"]["param_groups"][0]["lr"] = 9.0
    with pytest.raises(StateMismatchError, match="not of this outer optimizer: no such rate"):
        outer.load_state_dict(saved)
    assert outer.optimizer.param_groups[0]["lr"] == 1.0


def test_averages_are_not_kept() -> None:
    model = Model()
    outer = gck.diloco.OuterOptimizer(model, SIGNS, 1, group=SimulatedGroup(1).members[0])
    wander(model, 0, 0)
    outer.step()
    assert all(shared.grad is None for shared in outer.optimizer.param_groups[0]["params"])


def make(model: nn.Module | None = None, every: Any = 1, **options: Any) -> Callable[[], object]:
    return lambda: gck.diloco.OuterOptimizer(
        *(Model() if model is None else model, SIGNS, every),
        **({"group": SimulatedGroup(1).members[0]} | options),
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (make(every=0), ArgumentError, "sync_every must be at least 1, got 0"),
        (make(every=1.5), DtypeError, r"OuterOptimizer: sync_every must be an int, got 1.5 \(float\)"),
        (make(3), DtypeError, r"model must be a torch.nn.Module, got 3"),  # type: ignore[arg-type]
        (make(nn.Linear(2, 2).requires_grad_(False)), ArgumentError, "no parameters that train"),
        (make(nn.Linear(2, 2).double()), DtypeError, "got weight of torch.float64"),
        (
            make(optimizer=torch.optim.SGD([torch.zeros(1)])),
            DtypeError,
            "must make one of a list of parameters",
        ),
        (make(optimizer=lambda shared: torch.optim.SGD(shared[:2], lr=1.0)), ArgumentError, "one of all the"),
        (
            make(optimizer=lambda _: torch.optim.SGD([torch.zeros(1)])),
            ArgumentError,
            "and no others, got SGD",
        ),
        (make(algorithm="ring"), ArgumentError, "algorithm must be one of"),
        (make(bypass_names=["head"]), ArgumentError, r"no parameters of bypass_names \['head'\]"),
    ],
    ids=["every", "type", "model", "frozen", "dtype", "made", "some", "others", "algorithm", "names"],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_parameters_that_do_not_fill_their_memory() -> None:
    model = nn.Linear(40, 40, bias=False)
    model.weight = nn.Parameter(torch.ones(40, 80)[:, ::2])
    with pytest.raises(LayoutError, match=r"weight of strides \(80, 2\) does not fill its memory"):
        make(model)()


def test_ddp_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ArgumentError, match="DistributedDataParallel, which averages at every step"):
            make(DistributedDataParallel(Model()))()
    finally:
        dist.destroy_process_group()
