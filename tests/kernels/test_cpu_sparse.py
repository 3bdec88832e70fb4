"""Sums of sparse payloads on the CPU: any number of threads, any density, any address give the same bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gck._native import load
from gck.kernels.common.native import DTYPE_CODE, addresses
from tests.cases import same_bytes

CANARY, MARGIN = -77.25, 64
FORMATS = [
    (torch.float32, torch.int32),
    (torch.bfloat16, torch.int32),
    (torch.float16, torch.int64),
    (torch.float32, torch.int64),
]
# A tile has 2048, 8192 or 32768 entries; from 2**21 on, out is written past the caches.
SIZES = [1, 15, 2047, 2049, 8193, 100_003, 2**21 + 17]
MIXES = [(1, 0.0), (1, 0.3), (1, 1.0), (2, 0.5), (3, 0.02), (3, 1.0), (8, 0.001), (17, 0.03)]


class Gathered:
    """Bodies of `world` payloads of a random support, one behind the other."""

    def __init__(self, n: int, world: int, count: int, formats: tuple[torch.dtype, torch.dtype]) -> None:
        value, index = formats
        torch.manual_seed(n + world + count)
        support = torch.randperm(n)[:count]
        turned = [(support + rank * n // world).remainder(n).sort().values for rank in range(world)]
        self.indices = torch.stack(turned).to(index)
        self.values = torch.randn(world, count).to(value)
        if count > 2:
            self.values[0, :3] = torch.tensor([math.inf, -0.0, 1e-41]).to(value)
        self.offset, size = (-(-count * dtype.itemsize // 16) * 16 for dtype in formats)
        self.bodies = torch.zeros(world, self.offset + size, dtype=torch.uint8)
        self.bodies[:, : count * value.itemsize] = self.values.view(torch.uint8)
        self.bodies[:, self.offset : self.offset + count * index.itemsize] = self.indices.view(torch.uint8)

    def to(
        self, out: Tensor, alpha: float, clear: bool, add: bool, threads: int, divisor: float = 1.0
    ) -> tuple[int, int]:
        return load().sparse_decompress(
            addresses(self.bodies),
            self.values.shape[1],
            DTYPE_CODE[self.values.dtype],
            self.offset,
            self.indices.dtype == torch.int64,
            out.data_ptr(),
            out.numel(),
            alpha,
            clear,
            add,
            threads,
            divisor,
        )

    def one_by_one(self, start: Tensor, alpha: float, add: bool) -> Tensor:
        for values, indices in zip(self.values.float(), self.indices.long(), strict=True):
            scaled = values * alpha
            start[indices] = start[indices] + scaled if add else scaled
        return start


def surrounded(n: int, shift: int) -> tuple[Tensor, Tensor]:
    """(memory full of canaries, n elements within it): `shift` elements off a line of memory."""
    memory = torch.full((n + 3 * MARGIN,), CANARY)
    start = MARGIN + -memory.data_ptr() // 4 % 16 + shift
    return memory, memory[start : start + n]


@pytest.mark.parametrize(("world", "density"), MIXES)
@pytest.mark.parametrize("n", SIZES)
def test_as_one_by_one(n: int, world: int, density: float) -> None:
    formats = FORMATS[(SIZES.index(n) + MIXES.index((world, density))) % len(FORMATS)]
    gathered = Gathered(n, world, round(n * density), formats)
    base = torch.randn(n)
    wanted = {
        (True, True): gathered.one_by_one(torch.zeros(n), 0.7, True),
        (False, True): gathered.one_by_one(base.clone(), 0.7, True),
    }
    if world == 1:
        wanted[True, False] = gathered.one_by_one(torch.zeros(n), 0.7, False)
    for (clear, add), sums in wanted.items():
        for threads, shift in ((1, 0), (2, 1), (3, 15), (5, 4)):
            memory, out = surrounded(n, shift)
            out.copy_(torch.full((n,), math.nan) if clear else base)
            assert gathered.to(out, 0.7, clear, add, threads) == (-1, -1)
            assert same_bytes(out, sums), (clear, add, threads)
            out.fill_(CANARY)
            assert bool((memory == CANARY).all())
            if not clear:
                continue
            for divisor in (2.0, 3.0):
                assert gathered.to(out, 0.7, clear, add, threads, divisor) == (-1, -1)
                assert same_bytes(out, sums / divisor), (add, threads, divisor)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40_001])
def test_hostile_indices_are_found_before_anything_is_written(count: int, index: torch.dtype) -> None:
    n, least = 50_000, torch.iinfo(index).min
    gathered = Gathered(n, 3, count, (torch.float32, index))
    row = gathered.bodies[1, gathered.offset :].view(index)[:count]
    good = row.clone()
    for place in {0, count // 2, count - 1}:
        for wrong in (-1, least, n, torch.iinfo(index).max, "twice"):
            if wrong == "twice" and place == 0:
                continue
            row.copy_(good)
            row[place] = row[place - 1] if wrong == "twice" else wrong
            for clear in (True, False):
                memory, out = surrounded(n, 0)
                assert gathered.to(out, 1.0, clear, True, 2) == (1, place)
                assert bool((memory == CANARY).all())
