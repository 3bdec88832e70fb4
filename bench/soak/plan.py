"""What a soak does: a function of the seed alone, so that all ranks know it, and a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import gck

__all__ = [
    "DAMAGES", "FAULTS", "FREEZE_TIMEOUT", "STOPS", "Fault", "Operation", "Slot", "frozen", "plan", "slots"
]  # fmt: skip

DAMAGES = ("flip", "truncate", "repeat", "header")  # of what one rank receives, above the network
FAULTS = (*DAMAGES, "mismatch", "late", "stopped")
FREEZE_TIMEOUT = 2.0  # seconds, of the operations in which a rank is frozen
# Seconds that SIGSTOP holds a rank, by kind of fault: within every timeout, and longer than one's peers wait.
STOPS = {"stopped": 0.3, "frozen": FREEZE_TIMEOUT + 2.5}
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
    """One of FAULTS, or "frozen", on one rank; damage is done to the n-th payload of the all-reduce, from 0,
    and a rank is stopped before it sends that. Of "header" it is the n-th bit of the handshake that flips."""

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
            fault, algorithm = _fault(rng, rng.choice(FAULTS), world_size, chunked)
        validate = "first"
        if fault is not None:
            validate = "always" if fault.kind in ("mismatch", "header") else "off"
        planned.append(
            Operation(index, slot, rng.choice(DTYPES), algorithm, rng.choice(["avg", "sum"]), validate, fault)
        )
    return planned


def frozen(planned: Sequence[Operation], seed: int, world_size: int, every: int) -> list[Operation]:
    """The same operations, but one of `every` has a rank that is stopped for longer than its peers wait.

    It is in the middle of them: what comes afterwards goes by the group that was made anew.
    """
    rng, made, changed = random.Random(seed + 2), slots(seed), list(planned)
    for i in range(every // 2, len(planned), every):
        chunked = made[planned[i].slot].compressor.shard_unit is not None
        fault, algorithm = _fault(rng, "frozen", world_size, chunked)
        changed[i] = replace(planned[i], algorithm=algorithm, validate="off", fault=fault)
    return changed


def _fault(rng: random.Random, kind: str, world_size: int, chunked: bool) -> tuple[Fault, str]:
    """A fault, and the algorithm that it needs: what "auto" and "dense" send is not known here, and a fault
    must know which message it meets."""
    place = rng.randrange(512 if kind == "header" else 2 if chunked else 1)
    return Fault(kind, rng.randrange(world_size), place), "two_phase" if chunked else "one_phase"
