"""What is timed, on which inputs, and how a result is verified.

Of every task: `nbytes` is its size, `reset` makes inputs as they were at first, and `verify` raises
WrongResultError unless a result is what these inputs must give.

Sizes, algbw and busbw are those of nccl-tests: of an all-gather the bytes that a rank has at its end, of an
all-reduce those of the fp32 vector; algbw = size / time; busbw = algbw (W - 1) / W of the first, and twice
that of the second. Of a compressed all-reduce this is the size of what is reduced, not of what is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gck
from gck.compressor import reduce_
from gck.payload import SparseGrad
from gck.wire import Layout

__all__ = ["CHUNK", "TASKS", "Dense", "Packed", "Sparse", "Task", "WrongResultError"]

CHUNK = 256  # elements a scale
SAMPLE = 64 * CHUNK  # elements that are compared with the CPU's kernels at either end of a shard


class WrongResultError(AssertionError):
    """A method returned other bytes than expected; nothing is reported."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal, bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def numbers(rank: int, count: int, device: torch.device, begin: int = 0) -> Tensor:
    """fp32, in [-1, 1], other ones on every rank and of no short period: the same bits on any device."""
    places = torch.arange(begin, begin + count, device=device) + 7919 * rank
    return (places * 40503 % 65521 - 32760).float() / 32768


class Sparse:
    """The payload of one rank for a sparse all-gather: values and indices, in one body."""

    def __init__(self, rank: int, world_size: int, nbytes: int, device: torch.device) -> None:
        self.world_size, self.count = world_size, max(1, nbytes // world_size // 8)
        self.nbytes = 8 * self.count * world_size
        layout = Layout.of((torch.float32, self.count), (torch.int32, self.count))
        values, indices = layout.views(layout.empty_body(device))
        for field, expected in zip((values, indices), self.expected(rank, device), strict=True):
            field.copy_(expected)
        self.payload = SparseGrad(values, indices, 2 * self.count)

    @staticmethod
    def busbw(world_size: int) -> float:
        return (world_size - 1) / world_size

    def expected(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
        indices = 2 * torch.arange(self.count, dtype=torch.int32, device=device) + rank % 2
        return numbers(rank, self.count, device), indices

    def reset(self) -> None:
        pass

    def verify(self, result: Sequence[tuple[Tensor, Tensor]]) -> None:
        """result: values and indices of every rank."""
        if len(result) != self.world_size:
            raise WrongResultError(f"sparse all-gather: {len(result)} payloads of {self.world_size} ranks")
        for rank, found in enumerate(result):
            expected = self.expected(rank, found[0].device)
            for name, ours, theirs in zip(("values", "indices"), found, expected, strict=True):
                if not same(ours, theirs):
                    raise WrongResultError(f"sparse all-gather: {name} of rank {rank} are wrong")


class Packed:
    """Gradient and residuals of one rank for the 1-bit all-reduce."""

    def __init__(self, rank: int, world_size: int, nbytes: int, device: torch.device) -> None:
        self.rank, self.world_size, self.count = rank, world_size, max(1, nbytes // 4)
        self.nbytes = 4 * self.count
        self.shard = gck.shard_numel(self.count, CHUNK, world_size)
        self.source = numbers(rank, self.count, device)
        self.grad, self.err = torch.empty_like(self.source), torch.empty_like(self.source)
        self.server_err = torch.empty(self.shard, device=device)
        self.reset()

    @staticmethod
    def busbw(world_size: int) -> float:
        return 2 * (world_size - 1) / world_size

    def reset(self) -> None:
        self.grad.copy_(self.source)
        self.err.zero_()
        self.server_err.zero_()

    def verify(self, result: Tensor) -> None:
        """result: the averaged gradient; residuals are looked at as well.

        Chunks are compressed by themselves: both ends of every shard are compared with what the CPU's kernels
        make of these elements alone.
        """
        for owner in range(self.world_size):
            first, last = owner * self.shard, min((owner + 1) * self.shard, self.count)
            tail = max(first, last - SAMPLE)
            tail += -(tail - first) % CHUNK
            for begin, end in {(first, min(first + SAMPLE, last)), (tail, last)}:
                if begin < end:
                    self._verify_part(owner, result, begin, end)

    def _verify_part(self, owner: int, result: Tensor, begin: int, end: int) -> None:
        expected = reduced(self.world_size, begin, end, self.rank)
        own = slice(begin - owner * self.shard, end - owner * self.shard)
        found = [result[begin:end], self.err[begin:end]]
        found += [self.server_err[own]] if owner == self.rank else []
        for name, ours, theirs in zip(
            ("result", "residual", "server residual"), found, expected, strict=False
        ):
            if not same(ours.cpu(), theirs):
                raise WrongResultError(f"packed all-reduce: the {name} is wrong in elements {begin} to {end}")


def reduced(world_size: int, begin: int, end: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Result, residual of `rank` and server residual of elements [begin, end), on the host."""
    compressor, numel = gck.Sign(CHUNK), end - begin
    bodies = torch.zeros(world_size, compressor.layout(numel).nbytes, dtype=torch.uint8)
    errs = torch.zeros(world_size, numel)
    for sender in range(world_size):
        grad = numbers(sender, numel, torch.device("cpu"), begin)
        compressor.compress_(grad, errs[sender], bodies[sender : sender + 1])
    body, server_err, result = torch.zeros_like(bodies[0]), torch.zeros(numel), torch.empty(numel)
    reduce_(compressor, bodies, server_err, body, numel, divisor=world_size)
    compressor.decompress_(result, body)
    return result, errs[rank], server_err


class Dense:
    """An fp32 vector for an all-reduce, whose sums are exact in any order."""

    def __init__(self, rank: int, world_size: int, nbytes: int, device: torch.device) -> None:
        self.world_size, self.count = world_size, max(1, nbytes // 4)
        self.nbytes = 4 * self.count
        self.source = numbers(rank, self.count, device)
        self.vector = self.source.clone()

    @staticmethod
    def busbw(world_size: int) -> float:
        return 2 * (world_size - 1) / world_size

    def reset(self) -> None:
        self.vector.copy_(self.source)

    def verify(self, result: Tensor) -> None:
        """result: the sum."""
        expected = sum(numbers(rank, self.count, result.device) for rank in range(self.world_size))
        if not isinstance(expected, Tensor) or not same(result, expected):
            raise WrongResultError("all-reduce: the sum is wrong")


Task = Sparse | Packed | Dense
TASKS: dict[str, type[Task]] = {
    "sparse all-gather": Sparse,
    "packed all-reduce": Packed,
    "all-reduce": Dense,
}
