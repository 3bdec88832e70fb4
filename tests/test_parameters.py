"""What states of hooks say of a model's parameters."""

from __future__ import annotations

import re

from torch import nn

import gck
from gck.integrations import ddp


def model() -> nn.Module:
    net = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64))
    net[1].weight.requires_grad_(False)
    return net


def test_what_is_compressed_by_what() -> None:
    by_name = {"0.*": gck.TopK(ratio=0.01), "*": gck.LowRank(rank=4)}
    state = ddp.HookState(by_name, warmup_steps=5, model=model())
    first, *lines = repr(state).splitlines()
    assert first == "HookState: step 0, compresses from step 5 on"
    # 640 entries of 8 bytes; factors of 64 and 256 rows of 4 numbers; the frozen weight counts nowhere.
    assert [line.split("): ")[-1] for line in lines] == [
        "1 parameters, 64,000 elements, 0.64 bits each",
        "1 parameters, 16,384 elements, 2.50 bits each",
        "  not compressed: 4 parameters, 832 elements",
    ]
    assert lines[0].startswith("  TopK(ratio=0.01,")
    assert lines[1].startswith("  LowRank(rank=4,")


def test_compressors_that_are_alike() -> None:
    """Equal ones share messages, and a line."""
    alike = {"0.*": gck.Sign(), "3.*": gck.Sign(), "*": None}
    assert "2 parameters, 80,384 elements" in repr(ddp.HookState(alike, model=model()))


def test_more_than_without_compression() -> None:
    state = ddp.HookState(gck.LowRank(rank=64), model=nn.Linear(64, 64))
    assert "64.00 bits each, more than fp32" in repr(state)


def test_states_that_cannot_tell() -> None:
    unknown = repr(ddp.HookState(gck.Sign()))
    assert unknown == "HookState: step 0, compresses from step 0 on, of a model that it does not know"
    incomplete = ddp.HookState({"0.*": gck.Sign()}, model=model())
    assert re.fullmatch(r"<HookState: .*no pattern of compressor matches '3.weight'.*>", repr(incomplete))
    lazy = ddp.HookState(gck.Sign(), model=nn.LazyLinear(3))
    assert "uninitialized parameter" in repr(lazy)
    assert repr(ddp.HookState.__new__(ddp.HookState)).startswith("<HookState: ")
