"""What is measured: a plan (device, sizes), cases, and the record that a case leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.inputs import GAUSSIAN
from bench.measure import Buffers, Driver, Pool, Trial, median_and_iqr, seconds_of

__all__ = ["GCK", "HUGE", "Case", "Plan", "measure", "percent", "rounds_of", "short"]

GCK = "gck"
HUGE = 100_000_000  # where, but on a GPU, few settings are measured
FLOOR_BYTES = 12  # an element that err.add_(grad) moves in fp32
# A slow peer is known well enough after a few rounds: its spread is small beside its distance.
SLOW_SECONDS = 0.3
SLOW_ROUNDS = 2
PEER_SECONDS = 2.0  # of all rounds of a peer that is not slow


@dataclass(frozen=True)
class Plan:
    """One run of the suite."""

    device: torch.device
    quick: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        if self.quick:
            return (100_000,)
        return (1_000_000, 25_000_000) + ((HUGE,) if self.device.type == "cuda" else ())

    @property
    def sizes_and_huge(self) -> tuple[int, ...]:
        """Of what is measured at HUGE on every device."""
        return self.sizes if self.quick else tuple(sorted({*self.sizes, HUGE}))

    @property
    def large(self) -> int:
        """The one size of what is measured at one."""
        return self.sizes[0] if self.quick else 25_000_000

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.bfloat16

    def rounds(self, n: int) -> int:
        """Rounds of a fast case."""
        if self.quick:
            return 3
        if self.device.type == "cuda":
            return 30
        return 5 if n > 50_000_000 else 15 if n > 10_000_000 else 50 if n > 500_000 else 300

    def settings(self, values: tuple[Any, ...], typical: Any, n: int = 0) -> tuple[Any, ...]:
        """The values of a kernel's option to measure, of n elements: the typical one alone in a quick run,
        and of more than `sizes` have."""
        return (typical,) if self.quick or n > max(self.sizes) else values


def as_they_are(buffers: Buffers) -> Buffers:
    return buffers


@dataclass(frozen=True)
class Case:
    """One implementation of a kernel at one setting.

    Attributes:
        kernel: the public function measured.
        option: name of the setting, and `value`, its value.
        implementation: "gck", or the peer's name; a variant of gck is a peer of gck's common form.
        run: the call that is timed, with what `prepare` makes of a set of buffers.
        verify: raises unless this peer's result is that of gck; None for gck itself.
        inputs: which of `bench.inputs` the buffers hold.
        bytes: an element that must move, where it is not about what the floor moves.
        call: whether the time is that of the whole call, from Python to Python.
    """

    kernel: str
    option: str
    value: float | str
    n: int
    dtype: torch.dtype
    implementation: str
    run: Callable[[Any], Any]
    verify: Callable[[Pool], None] | None = None
    prepare: Callable[[Buffers], Any] = as_they_are
    inputs: str = GAUSSIAN
    bytes: float | None = None
    call: bool = False

    def __str__(self) -> str:
        parts = (self.kernel, short(self.n), dtype_name(self.dtype), self.setting, self.implementation)
        return "-".join(parts)

    @property
    def setting(self) -> str:
        return percent(self.value) if isinstance(self.value, float) else str(self.value)


def measure(case: Case, pool: Pool, plan: Plan, driver: Driver) -> dict[str, Any]:
    """Verifies a case, times it and returns its record (plain numbers, ready for JSON)."""
    # Either way the first call, which compiles kernels on a GPU, is not timed.
    if case.verify is None:
        case.run(case.prepare(pool.take()))
    else:
        case.verify(pool)
    given = case.prepare(pool.take())
    first = seconds_of(lambda: case.run(given), pool.device)
    slow = first > SLOW_SECONDS and not plan.quick
    trial = Trial(case.run, pool, case.prepare, call=case.call)
    trial(driver, rounds=rounds_of(case, plan, first), warmup_rounds=0 if slow else 3)
    seconds, iqr = median_and_iqr(trial.kernel)
    floor, floor_iqr = median_and_iqr(trial.floor)
    floor_fp32, _ = median_and_iqr(trial.floor_fp32)
    return {
        "kernel": case.kernel,
        "implementation": case.implementation,
        "option": case.option,
        "value": case.value,
        "setting": case.setting,
        "n": case.n,
        "grad_dtype": dtype_name(case.dtype),
        "inputs": case.inputs,
        "call": case.call,
        "verified_against_gck": None if case.verify is None else True,
        "rounds": len(trial.kernel),
        "seconds": seconds,
        "iqr_seconds": iqr,
        "floor_seconds": floor,
        "floor_iqr_seconds": floor_iqr,
        "floor_fp32_seconds": floor_fp32,
        "multiple_of_floor": seconds / floor,
        "multiple_of_fp32_floor": seconds / floor_fp32,
        # The floor of what moves another number of bytes: these, at the bandwidth of err.add_(grad).
        "bytes_per_element": case.bytes,
        "multiple_of_own_floor": None
        if case.bytes is None
        else seconds / (floor_fp32 * case.bytes / FLOOR_BYTES),
        # What others do on the machine only ever adds time: the least of each is least disturbed.
        "best_multiple_of_fp32_floor": min(trial.kernel) / min(trial.floor_fp32),
        "samples": trial.kernel,
        "floor_samples": trial.floor,
        "floor_fp32_samples": trial.floor_fp32,
    }


def rounds_of(case: Case, plan: Plan, seconds: float) -> int:
    """How often a case is timed that takes so many seconds."""
    if plan.quick:
        return plan.rounds(case.n)
    if seconds > SLOW_SECONDS:
        return SLOW_ROUNDS
    if case.verify is None:
        return plan.rounds(case.n)
    return min(plan.rounds(case.n), int(PEER_SECONDS / seconds))


def short(n: int) -> str:
    """1_000_000 -> 1M."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def percent(ratio: float) -> str:
    """0.01 -> 1%."""
    return f"{ratio * 100:g}%"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
