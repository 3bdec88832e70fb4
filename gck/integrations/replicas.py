"""Whether replicas of a model start from the same parameters, which later averages only keep equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from gck.collectives import Transport
from gck.collectives.work import perform
from gck.errors import CollectiveMismatchError

__all__ = ["check_replicas"]

DIGEST = 16  # bytes of each half of the first message


def check_replicas(
    function: str, transport: Transport, tensors: Mapping[str, Tensor], shapes: Sequence[Sequence[int]]
) -> None:
    """Compares the sum of each tensor's bits with that of every other rank; collective over the group.

    Two messages at most, of 32 bytes, and of 8 a tensor where ranks differ. Reads all tensors, once, and
    waits for their device.

    Args:
        tensors: by name, this rank's part of each.
        shapes: of the whole of each.

    Raises:
        CollectiveMismatchError: on all ranks, if names, shapes, dtypes or sums are not the same everywhere.
    """
    sums = torch.tensor([int(_bits(tensor).sum(dtype=torch.int64)) for tensor in tensors.values()])
    whole = zip(tensors.items(), shapes, strict=True)
    text = "\n".join(f"{name} {tuple(shape)} {tensor.dtype}" for (name, tensor), shape in whole)
    values = sums.numpy().tobytes()
    halves = [blake2b(part, digest_size=DIGEST).digest() for part in (text.encode(), values)]

    def run() -> None:
        rows = _gathered(transport, b"".join(halves))
        for rank, row in enumerate(rows):
            if row[:DIGEST] != rows[0][:DIGEST]:
                raise CollectiveMismatchError(
                    f"{function}: rank {rank} of the group has parameters of other names, shapes or dtypes "
                    "than rank 0"
                )
        if len(set(rows)) == 1:
            return
        all_sums = [
            torch.frombuffer(bytearray(row), dtype=torch.int64) for row in _gathered(transport, values)
        ]
        for i, name in enumerate(tensors):
            for rank, other in enumerate(all_sums):
                if other[i] != all_sums[0][i]:
                    raise CollectiveMismatchError(
                        f"{function}: {name} of rank {rank} of the group is not that of rank 0, and never "
                        "will be; load or broadcast the same parameters first"
                    )

    perform(transport, function, run, torch.device("cpu"), False)


def _bits(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    return tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))


def _gathered(transport: Transport, message: bytes) -> list[bytes]:
    rows = transport.all_gather_bytes(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    return [bytes(row.tolist()) for row in rows]
