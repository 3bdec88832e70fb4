"""One rank of a soak: `python -m bench.soak.worker ASSIGNMENT`, started by `gck.cli.crew`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import gck
from bench.soak.faulty import Faulty
from bench.soak.plan import DAMAGES, FREEZE_TIMEOUT, STOPS, Operation, Slot, frozen, plan, slots
from gck.cli.crew import end_with, event_stream, tell
from gck.collectives import SimulatedGroup, choose_algorithm, resolve
from gck.collectives.transports.simulated import SimulatedMember
from gck.errors import GckError

__all__ = ["Assignment", "main", "to_json"]


@dataclass(frozen=True)
class Assignment:
    """What a rank is told on its command line: the plan, and which part of it is this crew's."""

    rank: int
    world_size: int
    parent: int
    rendezvous: str
    seed: int
    operations: int
    rate: float
    first: int
    last: int
    timeout: float
    freeze_every: int = 0
    look_every: int = 0  # operations between two looks at memory and descriptors

    def planned(self) -> list[Operation]:
        """The operations of this crew."""
        part = plan(self.seed, self.operations, self.world_size, self.rate)[self.first : self.last]
        return frozen(part, self.seed, self.world_size, self.freeze_every) if self.freeze_every else part


class World:
    """The residuals of all ranks, as they must be: the same all-reduces, simulated, without faults."""

    def __init__(self, made: list[Slot], world_size: int) -> None:
        self.made = made
        self.states = [[gck.ErrorFeedback() for _ in range(world_size)] for _ in made]
        self.world_size = world_size

    def reduce(self, operation: Operation) -> tuple[Tensor, list[str]]:
        """The result, and a digest of every rank's residuals."""
        states = self.states[operation.slot]

        def rank_main(member: SimulatedMember) -> Tensor:
            grad = gradient(operation, self.made[operation.slot], member.rank)
            return reduce(operation, self.made, grad, states[member.rank], member, checksum=False)

        results = SimulatedGroup(self.world_size, timeout=60).run(rank_main)
        return results[0], [digest(*residuals(state)) for state in states]


def gradient(operation: Operation, slot: Slot, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(operation.index * 1009 + rank)
    return torch.randn(slot.numel, generator=generator).to(operation.dtype)


def reduce(
    operation: Operation,
    made: list[Slot],
    grad: Tensor,
    state: gck.ErrorFeedback,
    group: object,
    checksum: bool,
) -> Tensor:
    return gck.all_reduce_(
        grad,
        state,
        made[operation.slot].compressor,
        group,
        op=operation.op,
        algorithm=operation.algorithm,
        validate=operation.validate,
        checksum=checksum,
    )


def near(operation: Operation, made: list[Slot], grad: Tensor, right: Tensor) -> bool:
    """Whether a dense sum is that of another order of additions."""
    slot, algorithm = made[operation.slot], operation.algorithm
    if algorithm == "auto":
        algorithm = choose_algorithm(slot.compressor, [slot.numel], dist.get_world_size())
    rounding = 2 * torch.finfo(operation.dtype).eps
    return algorithm == "dense" and torch.allclose(grad.double(), right.double(), rounding, 1e-5)


def residuals(state: gck.ErrorFeedback) -> list[Tensor]:
    return [tensor for tensor in (state.worker, state.server) if tensor is not None]


def digest(*tensors: Tensor) -> str:
    whole = blake2b(digest_size=8)
    for tensor in tensors:
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def main(argv: list[str]) -> None:
    given = Assignment(**json.loads(argv[1]))
    end_with(given.parent)
    events = event_stream()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(given.rendezvous) / f"rendezvous{given.first}").as_uri(),
        rank=given.rank,
        world_size=given.world_size,
        timeout=timedelta(seconds=given.timeout),
    )
    made = slots(given.seed)
    states = [gck.ErrorFeedback() for _ in made]
    # One rank alone can tell what every rank must have.
    world = World(made, given.world_size) if given.rank == 0 else None

    def made_for(group: dist.ProcessGroup) -> Faulty:
        return Faulty(resolve(group), lambda seconds: tell(events, event="stopping", seconds=seconds))

    current = dist.new_group(timeout=timedelta(seconds=given.timeout))
    usual = made_for(current)
    for operation in given.planned():
        fault = operation.fault if operation.fault and operation.fault.rank == given.rank else None
        freezes = operation.fault is not None and operation.fault.kind == "frozen"
        group = usual.with_timeout(FREEZE_TIMEOUT) if freezes else usual
        group.arm(fault if fault and fault.kind in (*DAMAGES, *STOPS) else None)
        grad, state = gradient(operation, made[operation.slot], given.rank), states[operation.slot]
        before = digest(grad, *residuals(state))
        if fault and fault.kind == "late":
            time.sleep(0.02)
        call = operation
        if fault and fault.kind == "mismatch":
            grad = torch.cat([grad, grad[:1]])
            state = gck.ErrorFeedback()
            before = digest(grad)
        error, text = "", ""
        began = time.monotonic()
        try:
            reduce(call, made, grad, state, group, checksum=True)
        except GckError as caught:
            error, text = type(caught).__name__, str(caught)
        report = {"index": operation.index, "error": error, "text": text, "seconds": time.monotonic() - began}
        report["injected"] = bool(fault) and (fault.kind not in (*DAMAGES, *STOPS) or group.done)
        report["kind"] = fault.kind if fault else ""
        if error:
            report["unchanged"] = digest(grad, *residuals(state)) == before
        else:
            report |= {"result": digest(grad), "state": digest(*residuals(state))}
            if world is not None:
                result, right = world.reduce(operation)
                report |= {"right": (digest(result), right), "near": near(operation, made, grad, result)}
        if given.look_every and operation.index % given.look_every == 0:
            report |= {"memory": resident_bytes(), "descriptors": len(os.listdir("/proc/self/fd"))}
        tell(events, event="operation", **report)
        if freezes:
            # As a training would go on: with a new group of the same processes, and the residuals there are.
            old, current = current, dist.new_group(timeout=timedelta(seconds=given.timeout))
            dist.destroy_process_group(old)  # for its sockets
            usual = made_for(current)
        elif error in ("PeerLostError", "CollectiveTimeoutError", "GroupUnusableError"):
            break
    events.close()
    sys.stderr.flush()
    os._exit(0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def to_json(assignment: Assignment) -> str:
    return json.dumps(asdict(assignment))


if __name__ == "__main__":
    main(sys.argv)
