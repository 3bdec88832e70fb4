"""Data-parallel training with compressed gradients.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py [directory]

The two lines that matter are marked. With a directory, which all ranks see, it saves what it needs every
40 steps, and goes on from there when it is started again, however it ended, and with any number of
processes. The task is made up, so that
nothing has to be downloaded: a network learns to imitate another one with fixed random weights.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import gck  # (1)

STEPS = 200


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")

    torch.manual_seed(0)  # the same two networks on every rank
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)
    student = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8)).to(device)
    model = DistributedDataParallel(student)
    state = gck.ddp.register(model, gck.TopK(ratio=0.01))  # (2)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    loaded = state.load(folder, reshard=True) if folder else None
    if folder and loaded:
        saved = torch.load(folder / f"model-{loaded.step}.pt", map_location=device)
        student.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        print(f"rank {rank}: goes on from step {loaded.step} with {len(state.residuals)} residuals")

    for step in range(state.step + 1, STEPS + 1):
        torch.manual_seed(1000 * step + rank)  # different data on every rank
        inputs = torch.randn(128, 64, device=device)
        with torch.no_grad():
            targets = teacher(inputs)
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 40 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
        if folder and step % 40 == 0:
            # The model is the same on all ranks. What has not been sent yet lives in `state`, and differs
            # from rank to rank: each saves its own, after the model, which is there if all residuals are.
            if rank == 0:
                save_model(folder / f"model-{step}.pt", student, optimizer)
            state.save(folder)
    dist.destroy_process_group()


def save_model(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whole or not at all, as `state.save` does it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    main()
