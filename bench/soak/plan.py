"""What a soak does: a function of the seed alone, so that all ranks know it, and a run can be repeated."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

import gck

__all__ = ["DAMAGES", "FAULTS", "Fault", "Operation", "Slot", "plan", "slots"]

DAMAGES = ("flip", "truncate", "repeat")  # of what one rank receives, above the network
FAULTS = (*DAMAGES, "mismatch", "late")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 200_000
VALUE_BITS = (32, 16, 8, 4, 2)


@dataclass(frozen=True)
class Slot:
    """A gradient that is reduced again and again, with residuals of its own."""

    numel: int
    compressor: gck.Compressor


@dataclass(frozen=True)
class Fault:
    """One of FAULTS, on one rank; damage is done to the n-th payload of the all-reduce, from 0."""

    kind: str
    rank: int
    place: int


@dataclass(frozen=True)
class Operation:
    """One all-reduce."""

    index: int
    slot: int
    dtype: torch.dtype
    algorithm: str
    op: str
    validate: str
    fault: Fault | None


def slots(seed: int, count: int = 48) -> list[Slot]:
    """Gradients of all sizes from 1 to LARGEST, each with a compressor of its own."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        numel = int(LARGEST ** rng.random())
        chunk = 2 ** rng.randint(5, 12)
        made.append(
            Slot(
                numel,
                rng.choice(
                    [
                        gck.Sign(chunk_size=chunk),
                        gck.Quantize(bits=rng.choice([8, 4, 2]), chunk_size=chunk),
                        gck.ChunkTopK(k=chunk // 16, chunk_size=chunk, value_bits=rng.choice(VALUE_BITS)),
                        gck.TopK(ratio=0.01),
                        gck.TopK(ratio=0.1, value_dtype=torch.bfloat16),
                        gck.RandomK(ratio=0.05, seed=rng.randrange(1000)),
                    ]
                ),
            )
        )
    return made


def plan(seed: int, operations: int, world_size: int, rate: float) -> list[Operation]:
    """Args: rate: the share of operations that have a fault."""
    rng, planned, made = random.Random(seed + 1), [], slots(seed)
    for index in range(operations):
        slot = rng.randrange(len(made))
        chunked = made[slot].compressor.shard_unit is not None
        choices = ["one_phase", "two_phase"] if chunked else ["one_phase", "dense"]
        algorithm = rng.choice([*choices, "auto"])
        fault = None
        if rng.random() < rate:
            kind = rng.choice(FAULTS)
            # What "auto" and "dense" send is not known here; damage needs to know which message it meets.
            algorithm = "two_phase" if chunked else "one_phase"
            fault = Fault(kind, rng.randrange(world_size), rng.randrange(2 if chunked else 1))
        validate = "first"
        if fault is not None:
            validate = "always" if fault.kind == "mismatch" else "off"
        planned.append(
            Operation(index, slot, rng.choice(DTYPES), algorithm, rng.choice(["avg", "sum"]), validate, fault)
        )
    return planned
