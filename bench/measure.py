"""How time is taken: one core for pytest-benchmark, for the GPU check and for every device.

A time alone says little, so each sample of a kernel has a sample of the floor, `err.add_(grad)`, taken
just before it on buffers of the same pool. Buffers rotate, so that none is still in a cache from its last
use; residuals are restored after each turn of the pool, outside the timed part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import inputs as library

__all__ = ["CLOCK", "Buffers", "Driver", "Pool", "Trial", "drive", "median_and_iqr", "seconds_of"]

# Keeps a GPU busy for a few milliseconds while the host queues what is timed: launch costs of the
# host then do not count as time of the device.
SLEEP_CYCLES = 5_000_000
DEFAULT_CACHE_BYTES = 64 << 20
FAR_BEYOND = 16  # times the cache: what is that large drives itself out of it


@dataclass(frozen=True)
class Buffers:
    """One set of inputs. grad32 holds the same gradient in fp32 (the same tensor, if grad is fp32)."""

    pool: Pool
    grad: Tensor
    grad32: Tensor
    err: Tensor


class Pool:
    """Sets of equal inputs, handed out in turn; together larger than the cache."""

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        beyond_cache: bool = True,
        inputs: str = library.GAUSSIAN,
    ) -> None:
        grad, err = library.make(inputs, n)
        grad, self.saved = grad.to(device=device, dtype=dtype), err.to(device)
        self.n, self.dtype, self.device = n, dtype, device
        self._made: dict[object, Any] = {}
        cache = cache_bytes(device) if beyond_cache else 0
        touched = n * (dtype.itemsize + self.saved.element_size())
        # No multiple of 2 or 3: kernel and floors take turns, and none may always get the same set.
        count = max(5, -(-2 * cache // touched))
        while count % 2 == 0 or count % 3 == 0:
            count += 1
        if beyond_cache and touched > FAR_BEYOND * cache:
            count = 1
        self._sets = [self._set(grad) for _ in range(count)]
        self._next = 0

    def _set(self, grad: Tensor) -> Buffers:
        copy = grad.clone()
        return Buffers(self, copy, copy.float(), self.saved.clone())

    @cached_property
    def magnitude(self) -> Tensor:
        """|acc| of these inputs, for peers that only select."""
        return (self._sets[0].grad32 + self.saved).abs()

    def made(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` returned when first asked for: payloads, say, that cases of this pool share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def apart(self) -> Buffers:
        """A set outside the turn, for what is not timed; it may be kept."""
        return Buffers(self, self._sets[0].grad, self._sets[0].grad32, self.saved.clone())

    def take(self) -> Buffers:
        """The next set, its residual as at first; to be done with before the next `take`."""
        if self._next == len(self._sets):
            for buffers in self._sets:
                buffers.err.copy_(self.saved)
            self._next = 0
        self._next += 1
        return self._sets[self._next - 1]


class Clock:
    """Counts only what was timed by `seconds_of`. As pytest-benchmark's timer it makes that plugin record
    the device's time, taken here, instead of the host's."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Driver(Protocol):
    """Calls `setup` and then `target`, warmup_rounds + rounds times; pytest-benchmark's `pedantic` is one."""

    def __call__(
        self, target: Callable[[], Any], *, setup: Callable[[], None], rounds: int, warmup_rounds: int
    ) -> Any: ...


def drive(target: Callable[[], Any], *, setup: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
    """The driver where pytest-benchmark is not installed."""
    for _ in range(warmup_rounds + rounds):
        setup()
        target()


def seconds_of(run: Callable[[], Any], device: torch.device, *, call: bool = False) -> float:
    """Time of one call of `run` on the device; its result is freed after the clock stops.

    With `call`, the time that the caller waits, on a GPU too: launches count, and the device's work.
    """
    if device.type != "cuda" or call:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    del result
    return seconds


class Trial:
    """Times `run(prepare(buffers))`, with the floors in between; preparing is not timed.

    Attributes:
        kernel: seconds of each round.
        floor: seconds of `err.add_(grad)` before each round.
        floor_fp32: seconds of `err.add_(grad32)`; the same list as `floor` for fp32 gradients.
    """

    def __init__(
        self, run: Callable[[Any], Any], pool: Pool, prepare: Callable[[Buffers], Any], *, call: bool
    ) -> None:
        self._run, self._pool, self._prepare, self._call = run, pool, prepare, call
        self.kernel: list[float] = []
        self.floor: list[float] = []
        self.floor_fp32 = self.floor if pool.dtype == torch.float32 else []

    def __call__(self, driver: Driver, rounds: int, warmup_rounds: int) -> None:
        driver(self._time_kernel, setup=self._time_floors, rounds=rounds, warmup_rounds=warmup_rounds)
        for samples in (self.kernel, self.floor, self.floor_fp32):
            del samples[:-rounds]

    def _time_floors(self) -> None:
        taken = self._pool.take()
        self.floor.append(self._seconds(lambda: taken.err.add_(taken.grad)))
        if self.floor_fp32 is not self.floor:
            taken = self._pool.take()
            self.floor_fp32.append(self._seconds(lambda: taken.err.add_(taken.grad32)))

    def _time_kernel(self) -> None:
        given = self._prepare(self._pool.take())
        seconds = self._seconds(lambda: self._run(given))
        self.kernel.append(seconds)
        CLOCK.now += seconds

    def _seconds(self, run: Callable[[], Any]) -> float:
        return seconds_of(run, self._pool.device, call=self._call)


def median_and_iqr(samples: list[float]) -> tuple[float, float]:
    """Median and interquartile range; the range of a single sample is 0."""
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; a guess where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(text[:-1]) << 10 for text in (p.read_text().strip() for p in sizes) if text.endswith("K")]
    return max(found, default=DEFAULT_CACHE_BYTES)
