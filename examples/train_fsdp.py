"""Training of a model that is sharded inside each data centre, with compressed gradients between them.

    torchrun --standalone --nproc-per-node 4 examples/train_fsdp.py

Two replicas, of half of the processes each, stand for two data centres. The lines that matter are marked.
The task is made up: a network learns to imitate another one with fixed random weights.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import gck  # (1)

STEPS, REPLICAS = 120, 2


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, (ranks, rest) = dist.get_rank(), divmod(dist.get_world_size(), REPLICAS)
    if rest:
        raise SystemExit(f"the number of processes must be a multiple of {REPLICAS}")
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (REPLICAS, ranks), mesh_dim_names=("replica", "shard"))  # (2)

    torch.manual_seed(0)  # the same two networks on every rank
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["shard"])  # (3) inside a replica
    state = gck.fsdp.register(model, gck.Sign(), group=mesh["replica"].get_group())  # (4) between replicas

    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for step in range(1, STEPS + 1):
        torch.manual_seed(1000 * step + rank)  # different data on every rank
        inputs = torch.randn(128, 64, device=device)
        with torch.no_grad():
            targets = teacher(inputs)
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 40 in (0, 1):
            print(f"step {step}: loss {loss.item():.4f}")
    if rank == 0:
        names = ", ".join(state.residuals)
        print(f"{state.step} steps; residuals of this rank's shards of {names}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
