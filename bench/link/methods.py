"""What is timed: one all-reduce each, PyTorch's own beside gck's.

A method is made once a size and then called with a gradient; it says how long the all-reduce itself took.
`nbytes` is what a rank cannot help but send: the ring of a dense all-reduce, or the payloads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.collectives import Link, all_reduce_cost, choose_piece_numel

__all__ = ["BASELINE", "METHODS", "Make", "Method", "Run"]

Make = Callable[[int, Link | None], "Run"]  # for gradients of so many elements; the link, where there is one
Run = Callable[[Tensor], float]  # overwrites the gradient by the average over ranks; seconds it took
BASELINE = "dense fp32"
POWERSGD_RANK = 4


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        make: the method, on every rank.
        nbytes: bytes that a rank sends, of (numel, world size).
        untimed: calls before the first that counts: a step does not allocate and agree as the first one does.
        compressor: gck's, or any with algorithm "dense": what the cost model predicts the time of.
    """

    title: str
    make: Make
    nbytes: Callable[[int, int], int]
    untimed: int = 1
    compressor: gck.Compressor | None = None
    algorithm: str = "auto"


def _ring(nbytes: int, world_size: int) -> int:
    return 2 * nbytes * (world_size - 1) // world_size


def _dense(numel: int, link: Link | None) -> Run:
    def run(grad: Tensor) -> float:
        began = time.perf_counter()
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
        return time.perf_counter() - began

    return run


class _Weight(nn.Module):
    """A model whose gradient is what it is called with."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad).sum()


def matrix_shape(numel: int) -> tuple[int, int]:
    """The most nearly square matrix of `numel` elements: low rank needs one."""
    rows = int(numel**0.5)
    while numel % rows:
        rows -= 1
    return rows, numel // rows


def _hooked(hook: Any, state: Callable[[], Any]) -> Make:
    """A hook of PyTorch's, which only DDP can call; timed from its call until its future is done."""

    def make(numel: int, link: Link | None) -> Run:
        shape, took = matrix_shape(numel), [0.0]
        # Weights are the same already; at 100 Mbit/s it would take long to send them.
        model = DistributedDataParallel(_Weight(shape), init_sync=False)

        def timed(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            began = time.perf_counter()

            def done(future: torch.futures.Future[Tensor]) -> Tensor:
                took[0] = time.perf_counter() - began
                return future.value()

            return hook(state, bucket).then(done)

        timed.__annotations__.clear()  # DDP wants types there, or nothing; here they are text
        model.register_comm_hook(state(), timed)

        def run(grad: Tensor) -> float:
            model.zero_grad()
            model(grad.view(shape)).backward()
            grad.copy_(model.module.weight.grad.view(-1))
            return took[0]

        return run

    return make


def _quantised(numel: int, link: Link | None) -> Run:
    """The steps of PyTorch's quantization_pertensor_hook, with its own functions.

    The hook itself fails on gloo, whose futures hold the gathered tensors where NCCL's hold a list of them.
    """
    world_size = dist.get_world_size()

    def gather(tensor: Tensor) -> list[Tensor]:
        out = [torch.empty_like(tensor) for _ in range(world_size)]
        dist.all_gather(out, tensor)
        return out

    def run(grad: Tensor) -> float:
        began = time.perf_counter()
        observer = torch.ao.quantization.MinMaxObserver()
        observer(grad)
        own = torch.tensor(observer.calculate_qparams())
        levels = gather(own)
        codes = gather(quantization_hooks._quantize_per_tensor_backend(grad, *own))
        grad.zero_()
        for level, code in zip(levels, codes, strict=True):
            grad.add_(quantization_hooks._dequantize_per_tensor_backend(code, *level))
        grad /= world_size
        return time.perf_counter() - began

    return run


def _powersgd() -> Any:
    return powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2
    )


def _gck(title: str, compressor: gck.Compressor) -> Method:
    def make(numel: int, link: Link | None) -> Run:
        state = gck.ErrorFeedback()
        piece_numel = choose_piece_numel(compressor, numel, dist.get_world_size(), link=link)

        def run(grad: Tensor) -> float:
            began = time.perf_counter()
            gck.all_reduce_(grad, state, compressor, piece_numel=piece_numel)
            return time.perf_counter() - began

        return run

    def nbytes(numel: int, world_size: int) -> int:
        return all_reduce_cost(compressor, [numel], world_size).nbytes

    return Method(title, make, nbytes, compressor=compressor)


METHODS = {
    method.title: method
    for method in (
        Method(BASELINE, _dense, lambda n, w: _ring(4 * n, w), compressor=gck.TopK(k=1), algorithm="dense"),
        Method(
            "PyTorch bf16 hook",
            _hooked(default_hooks.bf16_compress_hook, lambda: None),
            lambda n, w: _ring(2 * n, w),
        ),
        Method(
            f"PyTorch PowerSGD hook, r = {POWERSGD_RANK}",
            _hooked(powerSGD_hook.powerSGD_hook, _powersgd),
            lambda n, w: _ring(4 * POWERSGD_RANK * sum(matrix_shape(n)), w),
            untimed=4,  # the first two send everything
        ),
        Method(
            "PyTorch 8-bit hook's steps",
            _quantised,
            lambda n, w: (w - 1) * (n + 8),
        ),
        _gck("gck 8 bits", gck.Quantize(bits=8)),
        _gck("gck 4 bits", gck.Quantize(bits=4)),
        _gck("gck top-k 1 %", gck.TopK(ratio=0.01)),
        _gck("gck chunk top-k, 64 of 4096, 2 bits", gck.ChunkTopK(k=64, chunk_size=4096, value_bits=2)),
        _gck("gck sign", gck.Sign()),
    )
}
