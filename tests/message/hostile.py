"""What any bytes may do, and what they may not; shared by the tests, the fuzzer and its corpus's replay."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gck
from gck.errors import CorruptPayloadError

# What is accepted is decompressed; a receiver bounds that, too.
MAX_NUMEL = 1 << 16
# from_bytes may allocate, all in all, this many times the bytes that are there, and as much again for small
# things: a scalar that a check returns has 64 bytes of its own.
MOST_TIMES, MOST_BYTES = 16, 1 << 16


class AllocationMeter(TorchDispatchMode):
    """Adds up the memory of everything that torch makes inside, freed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.nbytes += leaf.untyped_storage().nbytes()
        return result


def sealed(data: bytes | bytearray) -> bytes:
    """With the right checksum, where they say that they have one: so that it hides nothing."""
    changed = bytearray(data)
    if len(data) >= 64 and data[10] & 1:
        import xxhash  # which a machine that only runs GPU tests may lack

        struct.pack_into("<Q", changed, 56, 0)
        struct.pack_into("<Q", changed, 56, xxhash.xxh3_64_intdigest(changed))
    return bytes(changed)


def parse(data: bytes, max_numel: int | None) -> gck.Payload | None:
    """The payload, or None where the bytes were refused in the one way that they may be."""
    with AllocationMeter() as meter:
        try:
            payload = gck.from_bytes(data, max_numel=max_numel)
        except CorruptPayloadError:
            payload = None
    assert meter.nbytes <= MOST_TIMES * len(data) + MOST_BYTES, (meter.nbytes, len(data))
    return payload


def check(data: bytes) -> bool:
    """Whether the bytes were accepted. Then they decompress, and say the same when written again."""
    payload = parse(data, MAX_NUMEL)
    if payload is None:
        return False
    assert payload.numel <= MAX_NUMEL
    again = gck.to_bytes(payload, checksum=bool(data[10] & 1))
    assert again == data
    dense = gck.decompress(payload)
    added = gck.decompress_add_(torch.full_like(dense, -0.0), payload)
    assert torch.equal(dense.nan_to_num(7.0), added.nan_to_num(7.0))
    return True


def attempt(call: Callable[[], object]) -> bool:
    """Whether a call returned; if not, it said that a payload was corrupt."""
    try:
        call()
    except CorruptPayloadError:
        return False
    return True
