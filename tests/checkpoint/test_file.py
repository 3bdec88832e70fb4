"""Residuals through a file: what comes back, what does not fit, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap, ServerBinding
from gck.errors import (
    ArgumentError,
    BackendUnavailableError,
    CorruptPayloadError,
    DtypeError,
    GckError,
    StateMismatchError,
)
from tests.cases import same_bytes

RANK, WORLD, STEP = 1, 3, 40
SIGN = gck.Sign(chunk_size=32)
NUMELS = {"layer.weight": 100, "größe/0": 7, "empty": 0}


def used(fill: float = 0.0) -> ErrorFeedbackMap:
    """Residuals with every sign of zero, a denormal, and a state that was never used."""
    residuals = ErrorFeedbackMap()
    generator = torch.Generator().manual_seed(5)
    for name, numel in NUMELS.items():
        shard = gck.shard_numel(numel, 32, WORLD)
        worker = residuals[name].worker_for(torch.ones(numel)).normal_(generator=generator)
        worker[:2] = torch.tensor([-0.0, 1e-42])[:numel]
        server = residuals[name].server_for(shard, torch.device("cpu"), ServerBinding(RANK, WORLD, 32))
        server.normal_(generator=generator).add_(fill)
    residuals["layer.weight"].nonfinite_for(torch.device("cpu")).fill_(9)
    assert "fresh" not in residuals
    residuals["fresh"].rescale_(1)
    return residuals


def save(directory: Path, state: Any = None, **options: Any) -> Path:
    place = {"rank": RANK, "world_size": WORLD, "step": STEP, "compressor": SIGN, "shared": False}
    return gck.save_state(directory, used() if state is None else state, **(place | options))


def load(directory: Path, state: Any, **options: Any) -> int | None:
    place = {"rank": RANK, "world_size": WORLD, "step": STEP, "compressor": SIGN, "shared": False}
    loaded = gck.load_state(directory, state, **(place | options))
    return None if loaded is None else loaded.step


def equal(a: ErrorFeedbackMap, b: ErrorFeedbackMap) -> bool:
    """The same names and bytes."""

    def content(state: ErrorFeedback) -> list[Any]:
        return [state.worker, state.server, state.nonfinite]

    return sorted(a) == sorted(b) and all(
        state.binding == b[name].binding
        and all(
            (x is None and y is None) or (x is not None and y is not None and same_bytes(x, y))
            for x, y in zip(content(state), content(b[name]), strict=True)
        )
        for name, state in a.items()
    )


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
        (lambda d: save(d, {}), DtypeError, "save_state: state must be an ErrorFeedback or .* got dict"),
        (
            lambda d: load(d, None),
            DtypeError,
            "load_state: state must be an ErrorFeedback or .* got NoneType",
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


def metadata_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_metadata(raw: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with another header: `change` gets it, and our JSON in it."""
    header, data = metadata_of(raw)
    metadata = header["__metadata__"]
    state = json.loads(metadata["state"])
    change(header, state)
    if metadata.get("state"):
        metadata["state"] = json.dumps(state)
        metadata["crc32"] = str(zlib.crc32(metadata["state"].encode()))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lying(*keys: str, value: Any) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any], state: dict[str, Any]) -> None:
        place = state
        for key in keys[:-1]:
            place = place[key]
        if value is KeyError:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return lambda raw: with_metadata(raw, change)


W = ("tensors", "layer.weight")
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "noise": lambda raw: bytes(range(256)) * 4,
    "truncated": lambda raw: raw[:-5],
    "header cut": lambda raw: raw[:20],
    "longer": lambda raw: raw + b"\0" * 8,
    "huge header": lambda raw: struct.pack("<Q", 2**62) + raw[8:],
    "flipped bit": lambda raw: raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:],
    "no metadata": lambda raw: with_metadata(raw, lambda h, s: h.pop("__metadata__")),
    "other format": lambda raw: with_metadata(raw, lambda h, s: h["__metadata__"].update(format="pt")),
    "no state": lambda raw: with_metadata(raw, lambda h, s: h["__metadata__"].pop("state")),
    "no checksum": lambda raw: raw.replace(b'"crc32":', b'"crc33":', 1),
    "other tensor": lambda raw: with_metadata(
        raw, lambda h, s: h.update({"worker/x": h.pop("worker/layer.weight")})
    ),
    "two dimensions": lambda raw: with_metadata(
        raw, lambda h, s: h["worker/layer.weight"].update(shape=[10, 10])
    ),
    "ints": lambda raw: with_metadata(raw, lambda h, s: h["worker/layer.weight"].update(dtype="I32")),
    "step": lying("step", value=41),
    "rank": lying("rank", value=2),
    "negative rank": lying("rank", value=-1),
    "world": lying("world_size", value=2**80),
    "bool": lying("step", value=True),
    "scale": lying("scale", value=0),
    "nan scale": lying("scale", value=float("nan")),
    "single": lying("single", value=True),
    "no tensors": lying("tensors", value=KeyError),
    "tensors": lying("tensors", value=[1]),
    "entry": lying(*W, value=3),
    "numel": lying(*W, "numel", value=99),
    "no numel": lying(*W, "numel", value=KeyError),
    "unit": lying(*W, "fields", "unit", value=4096),
    "unit 0": lying(*W, "fields", "unit", value=0),
    "huge unit": lying(*W, "fields", "unit", value=2**62),
    "no unit": lying(*W, "fields", "unit", value=KeyError),
    "count": lying(*W, "fields", "nonfinite", value=-1),
    "text": lying(*W, "fields", "more", value="x"),
    "other rank": lying(*W, "fields", "rank", value=0),
    "infinite": lying(*W, "fields", "rank", value=float("inf")),
    "no rank": lying(*W, "fields", "rank", value=KeyError),
    "no world": lying(*W, "fields", "world_size", value=KeyError),
    "fields": lying(*W, "fields", value=[1]),
    "crc": lying(*W, "crc32", "worker", value=0),
    "crc kind": lying(*W, "crc32", "master", value=0),
    "one more": lying("tensors", "more", value={"numel": 3, "crc32": {"worker": 1}}),
    "one less": lying("tensors", "empty", value=KeyError),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_and_hostile_files(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    loaded = used(fill=1)
    # What only `load_state_dict` knows to be wrong it calls by its own name.
    with pytest.raises((CorruptPayloadError, StateMismatchError), match=r"load_state: .*safetensors|_dict: "):
        load(tmp_path, loaded)
    assert equal(loaded, used(fill=1))


def test_not_finite(tmp_path: Path) -> None:
    state = ErrorFeedback()
    state.worker_for(torch.ones(10))[4] = float("nan")
    save(tmp_path, state)
    with pytest.raises(CorruptPayloadError, match="worker residual of '' that is not finite"):
        load(tmp_path, ErrorFeedback())


def test_a_later_version(tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(with_metadata(path.read_bytes(), lambda h, s: h["__metadata__"].update(version="2")))
    with pytest.raises(StateMismatchError, match="has version '2' of the format, this gck reads '1'"):
        load(tmp_path, ErrorFeedbackMap())


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """A typed error, or, where the byte says nothing, the same residuals."""
    path = save(tmp_path)
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    noticed = 0
    for _ in range(400):
        at = int(torch.randint(len(raw), (1,), generator=generator))
        bit = 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
        loaded = used(fill=1)
        try:
            load(tmp_path, loaded, numels=NUMELS | {"fresh": 5})
        except GckError:
            noticed += 1
            assert equal(loaded, used(fill=1))
        else:
            assert equal(loaded, used())
    assert noticed > 390
