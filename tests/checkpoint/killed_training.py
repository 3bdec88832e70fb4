"""Training that is killed again and again: the processes of test_resume.py.

    python -m tests.checkpoint.killed_training <directory> <seed>

This process imports torch once and does nothing with it; every rank of every attempt is a fork of it. An
attempt ends when one of its ranks is killed by SIGKILL: by this process, as soon as it hears that a step
has begun, which meets any instruction of that step or the next ones; or by itself, at a point of saving.
Then the other rank is killed as well, and the next attempt goes on from what is on the disk.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch  # noqa: F401  # it and the next: imported on first use, which would be in every attempt
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gck
from gck.checkpoint import file as file_module

WORLD_SIZE, KILLS = 2, 20
# A step may be killed at 0 to 2 steps from an attempt's start, and is at most PATIENCE - 1 later: then ranks
# wait for it, so that on no machine an attempt that is to be killed ends first.
LATEST, PATIENCE = 2, 2
STEPS = KILLS * (LATEST + PATIENCE) + 1
POINTS = ("model", "fsync", "replace", "sync", "prune")


class Kill(NamedTuple):
    """Who dies in an attempt, at how many steps from its start, and where: at a point of saving, or, where
    that is empty, anywhere."""

    rank: int
    after: int
    point: str


def train(directory: Path, store: Path, rank: int, kill: Kill | None, pipe: int, forget: bool) -> None:
    """One rank of an attempt; reports each step's begin to `pipe`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), WORLD_SIZE), rank=rank, world_size=WORLD_SIZE
    )
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
    state = gck.ddp.HookState(gck.Sign(32), algorithm="two_phase", bypass_numel=100, model=inner)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01)
    loaded = state.load(directory)
    if loaded is not None:
        saved = torch.load(directory / f"model-{loaded.step}.pt")
        inner.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    if forget:
        state.residuals.reset()
    model = DistributedDataParallel(inner)
    model.register_comm_hook(state, gck.ddp.hook)
    start = state.step
    while state.step < STEPS:
        os.write(pipe, bytes([state.step - start]))
        if kill is not None and state.step - start >= kill.after + PATIENCE:
            signal.pause()
        armed = kill is not None and kill.rank == rank and state.step - start >= kill.after
        inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(10 * state.step + rank))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        save(directory, rank, inner, optimizer, state, kill.point if armed and kill is not None else "")
    report(directory, rank, inner, state)


def save(
    directory: Path, rank: int, model: nn.Module, optimizer: Any, state: gck.ddp.HookState, die: str
) -> None:
    """The model and the optimizer, the same on all ranks, and then the residuals of this rank."""
    if rank == 0:
        temporary = directory / "model.tmp"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
        die_at("model", die)
        temporary.replace(directory / f"model-{state.step}.pt")
    if die:
        replace, sync = Path.replace, file_module.sync_directory
        fsync, prune = os.fsync, gck.checkpoint.prune
        patched: tuple[tuple[Any, str, Any, str], ...] = (
            (file_module.os, "fsync", fsync, "fsync"),
            (Path, "replace", replace, "replace"),
            (file_module, "sync_directory", sync, "sync"),
            (gck.checkpoint, "prune", prune, "prune"),
        )
        for owner, name, function, point in patched:
            setattr(owner, name, lambda *args, f=function, p=point: (f(*args), die_at(p, die)))
    state.save(directory)
    if rank == 0:
        complete = gck.saved_steps(directory)
        for path in directory.glob("model-*.pt"):
            if complete and int(path.stem[6:]) < complete[0]:
                path.unlink()


def die_at(point: str, die: str) -> None:
    if point == die:
        os.kill(os.getpid(), signal.SIGKILL)


def report(directory: Path, rank: int, model: nn.Module, state: gck.ddp.HookState) -> None:
    """What must be the same whether the training was killed or not: weights, and residuals of this rank."""
    hashed = blake2b(digest_size=16)
    for tensor in (
        *model.state_dict().values(),
        *(t for _, r in state.residuals.items() for t in (r.worker, r.server)),
    ):
        assert isinstance(tensor, torch.Tensor)
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    (directory / f"{rank}.json").write_text(json.dumps({"digest": hashed.hexdigest(), "step": state.step}))


def attempt(directory: Path, store: Path, kill: Kill | None, forget: bool = False) -> list[int]:
    """Runs all ranks until they end or one is killed; their wait statuses."""
    read, write = os.pipe()
    ranks = []
    for rank in range(WORLD_SIZE):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(read)
                train(directory, store, rank, kill, write, forget)
                code = 0
            finally:
                os._exit(code)  # no destructors: the peer may be gone
        ranks.append(child)
    os.close(write)
    while report := os.read(read, 1):
        if kill is not None and not kill.point and report[0] >= kill.after:
            os.kill(ranks[kill.rank], signal.SIGKILL)
            break
        if (
            kill is not None
            and kill.point
            and os.waitid(os.P_PID, ranks[kill.rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ):
            break
    os.close(read)
    statuses = []
    for rank in sorted(range(WORLD_SIZE), key=lambda r: kill is None or r != kill.rank):
        if kill is not None and rank != kill.rank:
            os.kill(ranks[rank], signal.SIGKILL)
        statuses.append(os.waitpid(ranks[rank], 0)[1])
    return statuses


def main() -> None:
    root, choose = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for name in ("whole", "killed", "forgetful"):
        (root / name).mkdir()
    assert attempt(root / "whole", root / "store", None) == [0, 0]
    log = []
    for number in range(KILLS):
        point = POINTS[number // 2 % len(POINTS)] if number % 2 else ""
        # Rank 0 alone saves the model.
        kill = Kill(0 if point == "model" else choose.randrange(WORLD_SIZE), choose.randint(0, LATEST), point)
        statuses = attempt(root / "killed", root / f"store-{number}", kill)
        assert os.WIFSIGNALED(statuses[0]), (kill, statuses)
        assert os.WTERMSIG(statuses[0]) == signal.SIGKILL, (kill, statuses)
        log.append(kill._asdict() | {"complete": gck.saved_steps(root / "killed")})
    assert attempt(root / "killed", root / "store-last", None) == [0, 0]
    # The comparison can fail: without its residuals it is another training.
    attempt(root / "forgetful", root / "store-f0", Kill(0, STEPS - 3, "prune"))
    assert attempt(root / "forgetful", root / "store-f1", None, forget=True) == [0, 0]
    (root / "log.json").write_text(json.dumps({"steps": STEPS, "kills": log}))


if __name__ == "__main__":
    main()
