"""What save_state and load_state refuse, and that files and residuals are then as they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import gck
from gck.errors import StateMismatchError
from tests.checkpoint.saved import SIGN, load, save, used


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
