"""What save_state and load_state refuse, and that files and residuals are then as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ServerBinding, ShardBinding
from gck.errors import ArgumentError, DtypeError, StateMismatchError
from tests.cases import same_bytes
from tests.checkpoint.saved import SIGN, equal, load, save, used


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["worker", "server"])
def test_what_cannot_be_loaded_is_not_saved(kind: str, value: float, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step=step)
    before, broken = content(tmp_path), used()
    getattr(broken["layer.weight"], kind)[3] = value
    for step in (3, 4):
        text = f"^save_state: the {kind} residual of 'layer.weight' must be finite$"
        with pytest.raises(StateMismatchError, match=text):
            save(tmp_path, broken, step=step)
    with pytest.raises(StateMismatchError, match=f"^save_state: the {kind} residual of '' must be finite"):
        save(tmp_path / "other", broken["layer.weight"])
    assert content(tmp_path) == before
    assert load(tmp_path, used(fill=1), step=2) == 2


def test_a_residual_of_another_shape_is_not_saved(tmp_path: Path) -> None:
    state = used()["layer.weight"]
    assert state.worker is not None
    state.worker = state.worker.view(10, 10)
    with pytest.raises(StateMismatchError, match=r"worker residual of '' must be flat float32, got a tensor"):
        gck.save_state(tmp_path, state, rank=1, world_size=3, step=0, compressor=SIGN)
    assert not content(tmp_path)


def test_residuals_that_share_memory_are_not_saved(tmp_path: Path) -> None:
    memory, state = torch.ones(200), gck.ErrorFeedbackMap()
    state["a"].worker, state["b"].worker = memory[100:], memory[:100]  # of one buffer
    gck.save_state(tmp_path, state, rank=0, world_size=1, step=1)
    before = content(tmp_path)
    for other in (memory[99:199], memory[:100], memory[150:], memory[100:101]):
        state["a"].worker, state["b"].worker = memory[100:], other
        if other.data_ptr() == memory.data_ptr():
            state["a"].worker = memory[:50]
        text = "^save_state: the residuals worker of '[ab]' and worker of '[ab]' share memory$"
        with pytest.raises(StateMismatchError, match=text):
            gck.save_state(tmp_path, state, rank=0, world_size=1, step=2)
    assert content(tmp_path) == before


def test_a_sparse_residual_is_not_saved(tmp_path: Path) -> None:
    state = gck.ErrorFeedback()
    state.worker = torch.ones(5).to_sparse()
    with pytest.raises(StateMismatchError, match=r"residual of '' must be dense, got torch\.sparse_coo$"):
        gck.save_state(tmp_path, state, rank=0, world_size=1, step=0)


@pytest.mark.parametrize(
    ("numel", "binding", "error"),
    [
        (64, ServerBinding(0, 1, 32), "of 64 elements; a shard has 128"),
        (128, ServerBinding(0, 1, 1 << 24), "in units of 16777216 elements, of at most 16777215"),
    ],
)
def test_a_server_residual_of_no_shard_is_not_saved(
    numel: int, binding: Any, error: str, tmp_path: Path
) -> None:
    state = gck.ErrorFeedback()
    state.worker, state.server, state.binding = torch.ones(128), torch.ones(numel), binding
    with pytest.raises(StateMismatchError, match=f"^save_state: a server residual of '' {error}$"):
        gck.save_state(tmp_path, state, rank=0, world_size=1, step=0, compressor=SIGN)
    assert not content(tmp_path)


def test_a_rank_of_a_node_saves_what_is_its_own(tmp_path: Path) -> None:
    state = gck.ErrorFeedback()
    state.worker, state.server = torch.ones(64), torch.ones(32)
    state.binding, state.shard = ServerBinding(1, 2, 32), ShardBinding(128, 0, 2, 32)
    place: Any = {"world_size": 4, "step": 0, "compressor": SIGN}
    for rank in (0, 1, 3):
        with pytest.raises(StateMismatchError, match=f"belongs to rank 2 of 4, got rank {rank} of 4"):
            gck.save_state(tmp_path, state, rank=rank, **place)
    assert not content(tmp_path)
    gck.save_state(tmp_path, state, rank=2, **place)


@pytest.mark.parametrize("factor", [1e39, 1e300])
def test_residuals_that_a_scale_would_make_infinite(factor: float, tmp_path: Path) -> None:
    save(tmp_path, scale=1.0)
    save(tmp_path, step=50)
    single = used()["layer.weight"]
    save(tmp_path / "single", used()["layer.weight"], scale=1.0)
    before, loaded = sorted(tmp_path.iterdir()), used(fill=1)
    text = "^load_state: the worker residual of 'layer.weight' would not be finite, times 1e"
    with pytest.raises(ArgumentError, match=text):
        load(tmp_path, loaded, scale=factor)
    assert equal(loaded, used(fill=1))
    with pytest.raises(ArgumentError, match=r"^load_state: the worker residual of '' would not be finite"):
        load(tmp_path / "single", single, scale=factor)
    assert same_bytes(single.worker, used()["layer.weight"].worker)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("was", "scale"), [(1e-300, 1e300), (1e300, 1e-300)])
def test_scales_whose_ratio_is_no_number(was: float, scale: float, tmp_path: Path) -> None:
    save(tmp_path, scale=was)
    loaded = used(fill=1)
    with pytest.raises(
        ArgumentError, match=r"^load_state: scale / 1e[+-]300 must be positive and finite, got"
    ):
        load(tmp_path, loaded, scale=scale)
    assert equal(loaded, used(fill=1))


def test_a_scale_may_be_far_from_that_of_the_file(tmp_path: Path) -> None:
    """What fits is kept, though the ratio is no number of fp32."""
    state = used()
    for _, one in state.items():
        for residual in (one.worker, one.server):
            if residual is not None:
                residual.mul_(1e-30)
    save(tmp_path, state, scale=1e-40)
    loaded = used()
    load(tmp_path, loaded, scale=1.0)
    state.rescale_(1e40)
    assert equal(loaded, state)
    worker = loaded["größe/0"].worker
    assert worker is not None
    assert worker[3] != 0


def test_server_residuals_that_are_reset_may_be_of_any_size(tmp_path: Path) -> None:
    state = used()["layer.weight"]
    assert state.server is not None
    state.server.fill_(3e38)
    save(tmp_path, state)
    loaded = used()["layer.weight"]
    with pytest.raises(ArgumentError, match="the server residual of '' would not be finite"):
        load(tmp_path, loaded, scale=2.0)
    load(tmp_path, loaded, scale=2.0, server="reset")
    assert loaded.server is None


@pytest.mark.parametrize("compressor", [gck.Sign, "Sign(chunk_size=32)", 7, torch.zeros(1)])
def test_compressors_that_are_none(compressor: Any, tmp_path: Path) -> None:
    save(tmp_path)
    before, loaded = content(tmp_path), used(fill=1)
    with pytest.raises(DtypeError, match=r"^save_state: compressor must be a Compressor, got "):
        save(tmp_path, compressor=compressor)
    with pytest.raises(DtypeError, match=r"^load_state: compressor must be a Compressor, got "):
        load(tmp_path, loaded, compressor=compressor)
    assert content(tmp_path) == before
    assert equal(loaded, used(fill=1))


@pytest.mark.parametrize(("world_size", "error"), [("4", DtypeError), (True, DtypeError), (0, ArgumentError)])
def test_steps_of_no_world(world_size: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"^saved_steps: world_size "):
        gck.saved_steps(tmp_path, world_size=world_size)
