"""Data-parallel training with compressed gradients.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

The two lines that matter are marked. The task is made up, so that nothing has to be downloaded: a
network learns to imitate another one with fixed random weights.
"""

import tempfile
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
    torch.manual_seed(1 + rank)  # different data on every rank
    for step in range(1, STEPS + 1):
        inputs = torch.randn(128, 64, device=device)
        with torch.no_grad():
            targets = teacher(inputs)
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 40 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    # What has not been sent yet lives in `state`, and differs from rank to rank: each saves its own.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"checkpoint-{rank}.pt"
        torch.save({"model": student.state_dict(), "gck": state.state_dict()}, path)
        state.load_state_dict(torch.load(path)["gck"])
    print(f"rank {rank}: saved and loaded {len(state.residuals)} residuals")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
