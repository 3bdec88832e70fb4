"""What an `OuterOptimizer` does not take, go on with, or exchange."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.collectives import SimulatedGroup, SimulatedMember
from gck.errors import (
    ArgumentError,
    CollectiveMismatchError,
    DtypeError,
    LayoutError,
    StateMismatchError,
)
from tests.test_diloco import SIGNS, WORLD, Model, contents, equal, nesterov, wander


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
