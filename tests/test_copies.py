"""Compressors and layouts are values: they go through pickle, as to other processes or with `torch.save`, and
through `copy`, after use as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.wire import Layout
from tests.cases import make, same_bytes
from tests.contract import COMPRESSORS

NUMEL = 5000


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
}


def compressed(compressor: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    grad, err = make("few nonfinite", NUMEL, torch.float32)
    body = torch.zeros(layout.nbytes, dtype=torch.uint8)
    compressor.compress_(grad, err, body[None])
    return body, err


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_copy_of_a_compressor_and_its_layout_does_the_same(
    compressor: Any, copied: Callable[[Any], Any]
) -> None:
    layout = compressor.layout(NUMEL)
    wanted = compressed(compressor, layout)  # whatever is cached is there now
    native = layout.native

    twin, layout_twin = copied(compressor), copied(layout)
    assert (twin, layout_twin) == (compressor, layout)
    assert hash(layout_twin) == hash(layout)
    assert repr(twin) == repr(compressor)
    assert (layout_twin.native is None) == (native is None)
    assert all(map(same_bytes, compressed(twin, layout_twin), wanted))
    assert all(map(same_bytes, layout_twin.views(wanted[0]), layout.views(wanted[0])))


def test_what_is_one_layout_stays_one() -> None:
    layout = gck.Sign().layout(NUMEL)
    first, second = copy.deepcopy([layout, layout])
    assert first is second
    assert first is not layout
