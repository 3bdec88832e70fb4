"""Arguments that are True or False: a text, even "False", is no such thing, and would count as true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.error_feedback import ErrorFeedback, ErrorFeedbackMap
from gck.errors import DtypeError
from gck.message import to_buffers

PLACE: Any = {"rank": 0, "world_size": 1}
EMPTY: Any = {"version": 1}
PAYLOAD = gck.topk(torch.arange(9.0), k=3)
TOPK = gck.TopK(k=3)


def reduce(**options: Any) -> None:
    gck.all_reduce_(torch.ones(9), ErrorFeedback(), TOPK, group=gck.SimulatedGroup(1).members[0], **options)


def gather(**options: Any) -> None:
    gck.sparse_all_gather(PAYLOAD, gck.SimulatedGroup(1).members[0], **options)


def pack(**options: Any) -> None:
    member = gck.SimulatedGroup(1).members[0]
    gck.packed_all_reduce_(torch.ones(9), torch.zeros(9), torch.zeros(9), group=member, **options)


CALLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "to_bytes": ("checksum", lambda d, **o: gck.to_bytes(PAYLOAD, **o)),
    "to_buffers": ("checksum", lambda d, **o: to_buffers(PAYLOAD, **o)),
    "save_state": ("shared", lambda d, **o: gck.save_state(d, ErrorFeedback(), step=0, **PLACE, **o)),
    "load_state": (
        "shared reshard read_only",
        lambda d, **o: gck.load_state(d, ErrorFeedback(), step=0, **PLACE, **o),
    ),
    "ErrorFeedback": ("measure", lambda d, **o: ErrorFeedback(**o)),
    "ErrorFeedback.load_state_dict": (
        "reset_server",
        lambda d, **o: ErrorFeedback().load_state_dict(EMPTY, **o),
    ),
    "ErrorFeedbackMap.load_state_dict": (
        "reset_server",
        lambda d, **o: ErrorFeedbackMap().load_state_dict(EMPTY | {"tensors": {}}, **o),
    ),
    "ErrorFeedback.rescale_": ("drop", lambda d, **o: ErrorFeedback().rescale_(2.0, **o)),
    "ErrorFeedbackMap.rescale_": ("drop", lambda d, **o: ErrorFeedbackMap().rescale_(2.0, **o)),
    "HookState": (
        "bypass_1d checksum overlap skip_nonfinite measure",
        lambda d, **o: gck.ddp.HookState(TOPK, **o),
    ),
    "HookState.load_state_dict": (
        "reset_server",
        lambda d, **o: gck.ddp.HookState(TOPK).load_state_dict({}, **o),
    ),
    "SimulatedGroup": ("shared_gathers", lambda d, **o: gck.SimulatedGroup(1, **o)),
    "all_reduce_": ("checksum async_op", lambda d, **o: reduce(**o)),
    "packed_all_reduce_": ("checksum async_op", lambda d, **o: pack(**o)),
    "sparse_all_gather": ("async_op", lambda d, **o: gather(**o)),
    "topk_ef_": ("flat", lambda d, **o: gck.topk_ef_(torch.ones(9), torch.zeros(9), k=3, **o)),
}


@pytest.mark.parametrize("value", ["False", 1, None, torch.tensor(True)], ids=["text", "1", "None", "tensor"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, (names, _) in CALLS.items() for name in names.split()],
)
def test_flags_are_bools(function: str, name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match=rf"^{function}: {name} must be a bool, got "):
        CALLS[function][1](tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())
