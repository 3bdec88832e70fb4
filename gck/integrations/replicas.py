"""Whether replicas of a model start from the same parameters, which later averages only keep equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from gck.collectives import Transport
from gck.collectives.work import perform
from gck.errors import CollectiveMismatchError

__all__ = ["check_replicas", "check_same"]

DIGEST = 16  # bytes of each half of the first message
BLOCK = 1 << 22  # elements that are hashed at a time
GOLDEN = -0x61C8864680B583EB


def check_replicas(
    function: str, transport: Transport, tensors: Mapping[str, Tensor], about: Sequence[object]
) -> None:
    """Compares a hash of each tensor with that of every other rank; collective over the group.

    Two messages at most, of 32 bytes, and of 8 a tensor where ranks differ. Reads all tensors, once, and
    waits for their device.

    Args:
        tensors: by name, this rank's part of each.
        about: what else must be the same of each, as text: the shape of the whole, where in it the part is.

    Raises:
        CollectiveMismatchError: on all ranks, if names, dtypes, hashes or `about` differ.
    """
    hashes = torch.tensor([_hash(tensor) for tensor in tensors.values()], dtype=torch.int64, device="cpu")
    whole = zip(tensors.items(), about, strict=True)
    text = "\n".join(f"{name} {tensor.dtype} {more}" for (name, tensor), more in whole)
    values = hashes.numpy().tobytes()
    halves = [blake2b(part, digest_size=DIGEST).digest() for part in (text.encode(), values)]

    def run() -> None:
        rows = _gathered(transport, b"".join(halves))
        for rank, row in enumerate(rows):
            if row[:DIGEST] != rows[0][:DIGEST]:
                raise CollectiveMismatchError(
                    f"{function}: rank {rank} of the group has parameters of other names, shapes, shards, "
                    "flags or dtypes than rank 0"
                )
        if len(set(rows)) == 1:
            return
        all_hashes = [
            torch.frombuffer(bytearray(row), dtype=torch.int64) for row in _gathered(transport, values)
        ]
        for i, name in enumerate(tensors):
            for rank, other in enumerate(all_hashes):
                if other[i] != all_hashes[0][i]:
                    raise CollectiveMismatchError(
                        f"{function}: {name} of rank {rank} of the group is not that of rank 0, and never "
                        "will be; load or broadcast the same parameters first"
                    )

    perform(transport, function, run, torch.device("cpu"), False)


def check_same(function: str, transport: Transport, values: Mapping[str, int], advice: str = "") -> None:
    """Compares numbers, in [-2**63, 2**63), with those of every other rank; collective over the group.

    Args:
        values: by what they are, for texts.
        advice: the end of these.

    Raises:
        CollectiveMismatchError: on all ranks, if one has another.
    """
    own = torch.tensor(list(values.values()), dtype=torch.int64, device="cpu")

    def run() -> None:
        rows = [list(memoryview(row).cast("q")) for row in _gathered(transport, own.numpy().tobytes())]
        for name, found in zip(values, zip(*rows, strict=True), strict=True):
            if len(set(found)) > 1:
                raise CollectiveMismatchError(
                    f"{function}: ranks have different {name}: {list(found)}{advice}"
                )

    perform(transport, function, run, torch.device("cpu"), False)


def _hash(tensor: Tensor) -> int:
    """Of the bits and their places: a sum of mixed products modulo 2^64, the same on every device.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), figure 16, for how
    a bit comes to change half of all others.
    """
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().reshape(-1).view(dtype)
    total = 0
    for number, block in enumerate(bits.split(BLOCK)):
        mixed = torch.arange(number * BLOCK, number * BLOCK + block.numel(), device=bits.device)
        mixed = _mix(mixed * GOLDEN) ^ block.to(torch.int64)
        total += int(_mix(mixed).sum())
    return (total + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def _gathered(transport: Transport, message: bytes) -> list[bytes]:
    rows = transport.all_gather_bytes(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    return [bytes(row.tolist()) for row in rows]
