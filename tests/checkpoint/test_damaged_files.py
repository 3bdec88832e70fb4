"""Files of residuals that are damaged or hostile: typed errors, and nothing was changed."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import CorruptPayloadError, GckError, StateMismatchError
from tests.checkpoint.saved import NUMELS, equal, load, save, used


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
    "large scale": lying("scale", value=10**400),
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


def test_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gck wrote it once: it is not saved any more."""
    state = ErrorFeedback()
    state.worker_for(torch.ones(10))[4] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(gck.checkpoint.checks, "checked_residual", lambda *_: None)
        save(tmp_path, state)
    with pytest.raises(CorruptPayloadError, match="worker residual of '' that is not finite"):
        load(tmp_path, ErrorFeedback())


def test_a_later_version(tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(with_metadata(path.read_bytes(), lambda h, s: h["__metadata__"].update(version="3")))
    with pytest.raises(StateMismatchError, match="has version '3' of the format, this gck reads 1, 2"):
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
