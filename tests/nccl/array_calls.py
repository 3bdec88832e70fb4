"""What is done with arrays of CuPy on a GPU, and of NumPy on the host: the same calls, the same bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gck
from gck.error_feedback import ErrorFeedback
from tests.collectives import scenarios

__all__ = ["CALLS", "digest"]

NUMEL, K, CHUNK = 300_000, 1000, 256


def digest(*arrays: Any) -> str:
    """Of arrays and tensors, which must be there."""
    tensors = (array if isinstance(array, Tensor) else torch.from_dlpack(array) for array in arrays)
    return scenarios.digest(*(tensor.cpu() for tensor in tensors))


def gathered(group: Any, payload: Any) -> Any:
    """Without a wait where the group can."""
    own = getattr(group, "sparse_all_gather", None)
    return gck.sparse_all_gather(payload, group) if own is None else own(payload)


def sparse(library: Any, group: Any, grad: Any) -> list[Any]:
    err, total = (library.zeros(NUMEL, dtype=library.float32) for _ in range(2))
    payload = gck.topk_ef_(grad, err, k=K)
    gck.decompress(gathered(group, payload), out=total)
    return [err, total]


def sign(library: Any, group: Any, grad: Any) -> list[Any]:
    err, total = (library.zeros(NUMEL, dtype=library.float32) for _ in range(2))
    payload = gck.sign_ef_(grad, err, chunk_size=CHUNK)
    gck.decompress(gathered(group, payload), out=total)
    gck.decompress_add_(total, payload, 0.5)
    return [err, total]


def dense(library: Any, group: Any, grad: Any) -> list[Any]:
    if isinstance(group, gck.NcclCommunicator):
        group.all_reduce(grad)
    else:
        group.all_reduce(torch.from_dlpack(grad))
    return [grad]


def compressed(library: Any, group: Any, grad: Any) -> list[Any]:
    state = ErrorFeedback()
    gck.all_reduce_(grad, state, gck.ChunkTopK(k=16, chunk_size=1024), group, algorithm="two_phase")
    return [grad, state.worker, state.server]


def packed(library: Any, group: Any, grad: Any) -> list[Any]:
    shard = gck.shard_numel(NUMEL, CHUNK, group.world_size)
    err, server = (library.zeros(numel, dtype=library.float32) for numel in (NUMEL, shard))
    gck.packed_all_reduce_(grad, err, server, CHUNK, group)
    return [grad, err, server]


CALLS = (sparse, sign, dense, compressed, packed)
