"""Residuals through a file: what comes back, what does not fit, and saving that ends early."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import ArgumentError, BackendUnavailableError, DtypeError, StateMismatchError
from tests.cases import same_bytes
from tests.checkpoint.saved import NUMELS, RANK, SIGN, STEP, WORLD, equal, load, save, used


def test_every_byte_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "made" / "for it", step=STEP)
    assert path.name == "gck-000000000040-rank-00001-of-00003.safetensors"
    loaded = ErrorFeedbackMap()
    assert load(path.parent, loaded, numels=NUMELS | {"fresh": 5}) == STEP
    assert equal(loaded, used())
    assert os.listdir(path.parent) == [path.name]


def test_any_safetensors_tool_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(save(tmp_path, scale=1024.0), framework="pt") as file:
        assert same_bytes(file.get_tensor("worker/größe/0"), used()["größe/0"].worker)
        said = json.loads(file.metadata()["state"])
    assert (said["gck"], said["step"], said["scale"]) == (gck.__version__, STEP, 1024.0)
    assert said["compressor"] == "Sign(chunk_size=32, decay=1.0, clip=None)"


def test_one_tensor(tmp_path: Path) -> None:
    state, loaded = used()["layer.weight"], ErrorFeedback()
    save(tmp_path, state)
    assert load(tmp_path, loaded, numels=100) == STEP
    assert same_bytes(loaded.worker, state.worker)
    assert same_bytes(loaded.server, state.server)
    with pytest.raises(StateMismatchError, match="an ErrorFeedback was saved, got an ErrorFeedbackMap"):
        load(tmp_path, ErrorFeedbackMap())
    save(tmp_path)
    with pytest.raises(StateMismatchError, match="an ErrorFeedbackMap was saved, got an ErrorFeedback"):
        load(tmp_path, ErrorFeedback())


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    path, loaded = save(tmp_path), used(fill=1)
    load(tmp_path, loaded)
    path.write_bytes(b"")
    assert equal(loaded, used())


def test_seeds_of_a_step_do_not_count(tmp_path: Path) -> None:
    state = ErrorFeedback()
    state.worker_for(torch.ones(10))
    save(tmp_path, state, compressor=gck.RandomK(ratio=0.5, seed=1))
    assert load(tmp_path, ErrorFeedback(), compressor=gck.RandomK(ratio=0.5, seed=2)) == STEP


def test_residuals_follow_the_scale_of_the_loss(tmp_path: Path) -> None:
    place: Any = {"rank": RANK, "world_size": WORLD, "step": STEP, "compressor": SIGN, "shared": False}
    save(tmp_path, scale=1024.0)
    loaded, expected = ErrorFeedbackMap(), used()
    assert gck.load_state(tmp_path, loaded, **place) == (STEP, 1024.0, WORLD)
    assert equal(loaded, expected)
    assert gck.load_state(tmp_path, loaded, scale=512.0, **place) == (STEP, 512.0, WORLD)
    expected.rescale_(0.5)
    assert equal(loaded, expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"numels": {"layer.weight": 99, "größe/0": 7, "empty": 0, "fresh": 1}},
            "layer.weight: .* 100 .* 99",
        ),
        ({"numels": {"layer.weight": 100}}, "no parameter is named 'größe/0'"),
        ({"compressor": gck.Sign(chunk_size=64)}, r"saved by compressor Sign\(chunk_size=32.*chunk_size=64"),
        ({"compressor": None}, r"saved by compressor Sign.*this is None"),
        ({"step": 41}, "000041-rank-00001-of-00003.safetensors does not exist"),
        ({"rank": 0}, "rank-00000-of-00003.safetensors does not exist"),
        ({"world_size": 2}, "rank-00001-of-00002.safetensors does not exist"),
        (
            {"shared": True},
            r"step 40 is not complete .*of 3 ranks, \[0, 2\] are missing.*complete steps: \[\]",
        ),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    save(tmp_path)
    loaded = used(fill=1)
    with pytest.raises(StateMismatchError, match=text):
        load(tmp_path, loaded, **options)
    assert equal(loaded, used(fill=1))


def test_residuals_of_another_rank_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"'layer.weight' belongs to rank 1 of 3, got rank 2 of 3"):
        save(tmp_path, rank=2)
    assert not list(tmp_path.iterdir())


def test_another_compressor_without_the_server_residuals(tmp_path: Path) -> None:
    save(tmp_path)
    loaded = ErrorFeedbackMap()
    load(tmp_path, loaded, compressor=gck.TopK(ratio=0.1), server="reset")
    assert loaded["layer.weight"].server is None
    assert same_bytes(loaded["layer.weight"].worker, used()["layer.weight"].worker)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda d: save(d, {}),
            DtypeError,
            r"save_state: state must be an ErrorFeedback or .* got {} \(dict\)",
        ),
        (
            lambda d: load(d, None),
            DtypeError,
            "load_state: state must be an ErrorFeedback or .* got None",
        ),
        (lambda d: save(d, rank=3), ArgumentError, "rank out of range, got 3 of world size 3"),
        (lambda d: save(d, step=-1), ArgumentError, "step out of range, got -1"),
        (lambda d: save(d, step=None), DtypeError, "step must be an int, got None"),
        (lambda d: save(d, rank=True), DtypeError, "rank must be an int, got True"),
        (lambda d: save(d, scale=0), ArgumentError, "scale must be positive and finite, got 0"),
        (lambda d: save(d, keep=1), ArgumentError, "keep must be at least 2 with shared=False, got 1"),
        (lambda d: load(d, used(), op="mean"), ArgumentError, "op must be one of avg, sum, got 'mean'"),
        (lambda d: load(d, used(), server="no"), ArgumentError, "server must be one of keep, fold, reset"),
        (lambda d: load(d, used(), step=None), ArgumentError, r"\(shared=False\) needs step="),
        (lambda d: load(d, used(), reshard=True), ArgumentError, "lacks others' files"),
        (
            lambda d: gck.saved_steps(d, rank=1),
            DtypeError,
            "saved_steps: world_size must be an int, got None",
        ),
    ],
)
def test_wrong_arguments(
    call: Callable[[Path], Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


POINTS = ("unlink", "save_file", "fsync", "replace", "fsync of the directory", "done")


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_saves(point: str, tmp_path: Path) -> None:
    """SIGKILL of a real process right after each thing that saving does to the disk."""
    save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks with threads; the child starts none
        child = os.fork()
    if child == 0:
        _die_after(point)
        save(tmp_path, used(fill=1))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    loaded = ErrorFeedbackMap()
    load(tmp_path, loaded)
    expected = used(fill=1 if POINTS.index(point) >= POINTS.index("replace") else 0)
    assert equal(loaded, expected)
    # The next save clears up.
    save(tmp_path, used(fill=2))
    load(tmp_path, loaded)
    assert equal(loaded, used(fill=2))
    assert len(list(tmp_path.iterdir())) == 1


def _die_after(point: str) -> None:
    import safetensors.torch

    from gck.checkpoint import file as module

    calls: list[str] = []

    def dying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == point == "save_file":
                # In the middle of it: a part of the file is there.
                Path(args[1]).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            calls.append(name)
            here = f"{name} of the directory" if calls.count(name) > 1 else name
            if here == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    module.os.fsync = dying("fsync", os.fsync)
    Path.unlink = dying("unlink", Path.unlink)  # type: ignore[method-assign]
    Path.replace = dying("replace", Path.replace)  # type: ignore[method-assign]
    safetensors.torch.save_file = dying("save_file", safetensors.torch.save_file)
    if point == "done":
        gck.checkpoint.prune = dying("done", gck.checkpoint.prune)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, used(fill=1))
    loaded = ErrorFeedbackMap()
    load(tmp_path, loaded)
    assert equal(loaded, used())
    assert len(list(tmp_path.iterdir())) == 1


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # type: ignore[arg-type]
    for call in (save, lambda directory: load(directory, used())):
        with pytest.raises(BackendUnavailableError, match="pip install safetensors numpy"):
            call(tmp_path)
