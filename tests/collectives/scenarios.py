"""Calls that are made on simulated ranks and on real ones, and must give the same bytes on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

import gck
from gck.collectives import Work, all_reduce_, all_reduce_many_, packed_all_reduce_, sparse_all_gather
from gck.collectives.handshake import describe
from gck.compressor import shard_numel
from gck.error_feedback import ErrorFeedback
from gck.kernels.chunk_topk import ChunkTopK
from gck.kernels.low_rank import LowRank
from gck.kernels.quantize import Quantize
from gck.kernels.random_k import RandomK
from gck.kernels.sign import Sign
from gck.kernels.topk import TopK

SIZES = (0, 1, 2, 33, 1001)


def digest(*tensors: Tensor | None) -> str:
    """Of the bytes of all tensors."""
    hashed = blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            hashed.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def gradient(rank: int, n: int, dtype: torch.dtype = torch.float32, step: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def run(rank: int, world_size: int, group: Any, in_flight: bool = False) -> dict[str, tuple[str, str]]:
    """(digest of what all ranks must share, digest of this rank's residuals) by scenario.

    With `in_flight` by asynchronous calls, those of a scenario all at once.
    """
    handles: list[Work[Any]] = []

    def call(function: Any, *args: Any, **options: Any) -> Any:
        if not in_flight:
            return function(*args, **options)
        handles.append(function(*args, **options, async_op=True))
        return handles[-1]

    results = {}
    for name, shared, states in _scenarios(rank, world_size, group, call):
        for handle in handles:
            handle.wait(60)
        handles.clear()
        own = [tensor for state in states for tensor in _buffers(state)]
        results[name] = (digest(*shared()), digest(*own))
    return results


def _buffers(state: ErrorFeedback | Tensor) -> list[Tensor | None]:
    return [state] if isinstance(state, Tensor) else [state.worker, state.server]


def _result(called: Any) -> Any:
    return called.wait() if isinstance(called, Work) else called


def _scenarios(
    rank: int, world_size: int, group: Any, call: Callable[..., Any]
) -> Iterator[tuple[str, Callable[[], list[Tensor]], Sequence[ErrorFeedback | Tensor]]]:
    for compressor in (
        TopK(ratio=0.1),
        TopK(ratio=0.3, value_dtype=torch.float16),
        Sign(32),
        Sign(256),
        ChunkTopK(k=6, chunk_size=64, value_bits=2),
        Quantize(2, 64, "stochastic", seed=rank),  # of which ranks may have different ones
        RandomK(ratio=0.1, seed=3, value_dtype=torch.bfloat16),  # of which they must have the same
        LowRank(rank=2, seed=3),
    ):
        algorithms = ("one_phase", "auto") if compressor.shard_unit is None else ("one_phase", "two_phase")
        if isinstance(compressor, LowRank):
            algorithms = ("factored", "auto")
        for algorithm in algorithms:
            for n in SIZES:
                # A dense ring adds in another order; two addends have only one.
                if algorithm == "auto" and n < 1001 and world_size > 2:
                    continue
                for dtype in (
                    (torch.float32, torch.bfloat16, torch.float16) if n == 1001 else (torch.float32,)
                ):
                    state = ErrorFeedback()
                    results = []
                    for step in range(2):
                        results.append(gradient(rank, n, dtype, step))
                        op = "avg" if step else "sum"
                        call(all_reduce_, results[-1], state, compressor, group, op, algorithm)
                    yield f"{describe(compressor)} {algorithm} {n} {dtype}", results.copy, [state]

    for n in SIZES:
        grad, err = gradient(rank, n), gradient(rank, n, step=1)
        server = torch.zeros(shard_numel(n, 64, world_size))
        call(packed_all_reduce_, grad, err, server, 64, group)
        yield f"packed {n}", [grad].copy, [err, server]

    grads = [gradient(rank, n) for n in SIZES]
    states = [ErrorFeedback() for _ in SIZES]
    call(all_reduce_many_, grads, states, Sign(32), group, algorithm="two_phase")
    yield "many", grads.copy, states

    for compressor in (Sign(32), Quantize(4, 64, "stochastic", seed=rank)):
        grads = [gradient(rank, n) for n in SIZES]
        states = [ErrorFeedback() for _ in SIZES]
        for _ in range(2):
            options = {"algorithm": "two_phase", "piece_numel": 200}
            call(all_reduce_many_, grads, states, compressor, group, **options)
        yield f"pieces {compressor.name}", grads.copy, states

    grads = [gradient(rank, n) for n in SIZES]
    states = [ErrorFeedback() for _ in SIZES]
    for _ in range(2):
        call(all_reduce_many_, grads, states, Sign(32), group, algorithm="one_phase", piece_numel=200)
    yield "pieces of one phase", grads.copy, states

    whole = torch.arange(1001).float() * (rank + 1)  # integers, exact in any order
    call(all_reduce_, whole, None, Sign(32), group, "sum", "dense")
    yield "dense", [whole].copy, []

    for compressor, algorithm in (
        (TopK(ratio=0.1), "one_phase"),
        (Sign(32), "two_phase"),
        (ChunkTopK(k=4, chunk_size=32, value_bits=4), "two_phase"),
        (Quantize(8, 32), "two_phase"),
    ):
        grad, state = gradient(rank, 300), ErrorFeedback()
        if rank == world_size - 1:
            grad[100], grad[299] = math.inf, -math.inf
        call(all_reduce_, grad, state, compressor, group, "sum", algorithm)
        yield f"nonfinite {compressor} {algorithm}", lambda grad=grad: [grad.isfinite()], [state]

    payload = gck.topk(gradient(rank, 500), 0.1)
    gathered = call(sparse_all_gather, payload, group)
    yield (
        "gather",
        lambda: [t for p in _result(gathered) for t in (p.values, p.indices)],
        [payload.values],
    )

    own = gck.chunk_topk(gradient(rank, 500), 64, 7, value_bits=4)
    chunks = call(sparse_all_gather, own, group)
    yield (
        "gather chunks",
        lambda: [t for p in _result(chunks) for t in p.fields],
        [gck.decompress(own)],
    )
