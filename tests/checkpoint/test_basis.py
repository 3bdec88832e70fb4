"""Bases of factored all-reduces, in dicts and in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import CorruptPayloadError, StateMismatchError
from tests.cases import same_bytes
from tests.checkpoint.saved import load, save, used
from tests.checkpoint.test_damaged_files import with_metadata

COMPRESSOR = gck.LowRank(rank=2)
BASIS = torch.tensor([[1.0, -0.0, 1e-42], [4.0, 5.0, 6.0]])
W = "layer.weight"


def based() -> ErrorFeedbackMap:
    residuals = ErrorFeedbackMap()
    residuals[W].worker_for(torch.ones(4, 3)).fill_(2.0)
    residuals[W].basis = BASIS.clone()
    residuals["other"].worker_for(torch.ones(5))
    return residuals


def content(state: ErrorFeedback) -> tuple[torch.Tensor, torch.Tensor]:
    assert state.worker is not None
    assert state.basis is not None
    return state.worker, state.basis


def test_a_dict_of_it() -> None:
    state, loaded = based()[W], ErrorFeedback()
    saved = state.state_dict()
    loaded.load_state_dict(saved, numel=12)
    assert all(same_bytes(x, y) for x, y in zip(content(state), content(loaded), strict=True))
    assert loaded.basis is not state.basis
    loaded.load_state_dict({"version": saved["version"], "worker": saved["worker"]})
    assert loaded.basis is None
    snapshot = state.snapshot()
    state.basis = torch.zeros(1, 1)
    state.restore(snapshot)
    assert same_bytes(state.basis, BASIS)
    state.rescale_(0.5)
    assert same_bytes(state.basis, BASIS)
    assert bool((content(state)[0] == 1.0).all())
    state.reset()
    assert state.basis is None


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 4},
        {"columns": 0},
        {"columns": -3},
        {"columns": True},
        {"columns": 3.0},
        {"columns": None},
        {"basis": BASIS},
        {"basis": torch.zeros(0)},
        {"basis": torch.full((6,), torch.nan)},
        {"basis": BASIS.view(-1).double()},
        {"basis": [1.0] * 6},
    ],
    ids=str,
)
def test_a_dict_that_contradicts_itself(change: dict[str, Any]) -> None:
    loaded = based()[W]
    with pytest.raises(StateMismatchError, match="the saved basis"):
        loaded.load_state_dict(based()[W].state_dict() | change)
    assert all(same_bytes(x, y) for x, y in zip(content(loaded), content(based()[W]), strict=True))


def test_a_file_of_it(tmp_path: Path) -> None:
    path, loaded = save(tmp_path, based(), compressor=COMPRESSOR, scale=2.0), ErrorFeedbackMap()
    load(tmp_path, loaded, compressor=COMPRESSOR, scale=1.0)
    worker, basis = content(loaded[W])
    assert bool((worker == 1.0).all())  # in units of the gradient, which a basis is not
    assert same_bytes(basis, BASIS)
    assert loaded["other"].basis is None
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "2"
        assert same_bytes(file.get_tensor(f"basis/{W}"), BASIS.view(-1))


def test_files_without_it_are_of_the_first_version(tmp_path: Path) -> None:
    with safe_open(save(tmp_path, used()), framework="pt") as file:
        assert file.metadata()["version"] == "1"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_world_of_another_size_has_it_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    for rank in range(3):
        state = based()
        if rank == 0:
            state[W].basis = None  # as of one that was not there, and has begun anew
        save(tmp_path, state, rank=rank, world_size=3, compressor=COMPRESSOR, shared=True)
    for rank in range(world_size):
        place: dict[str, Any] = {"rank": rank, "world_size": world_size, "shared": True}
        loaded = ErrorFeedbackMap()
        load(tmp_path, loaded, **place, compressor=COMPRESSOR, reshard=world_size != 3)
        if world_size != 3 or rank:
            assert same_bytes(content(loaded[W])[1], BASIS)


def lying(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    return lambda raw: with_metadata(raw, lambda header, state: change(state["tensors"][W]) and None)


@pytest.mark.parametrize(
    "damage",
    [
        lying(lambda entry: entry["fields"].update(columns=4)),
        lying(lambda entry: entry["fields"].update(columns=0)),
        lying(lambda entry: entry["fields"].update(columns=12)),
        lying(lambda entry: entry["fields"].pop("columns")),
        lying(lambda entry: entry["fields"].update(columns=-3)),
        lying(lambda entry: entry["crc32"].update(basis=0)),
        lying(lambda entry: entry["crc32"].pop("basis")),
    ],
)
def test_files_that_lie_of_it(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path, loaded = save(tmp_path, based(), compressor=COMPRESSOR), ErrorFeedbackMap()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptPayloadError, match="load_state"):
        load(tmp_path, loaded, compressor=COMPRESSOR)
    assert not len(loaded)
