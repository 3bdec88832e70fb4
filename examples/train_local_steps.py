"""Many local steps between two exchanges, over the internet say: DiLoCo's, compressed as SparseLoCo does.

    torchrun --standalone --nproc-per-node 4 examples/train_local_steps.py [directory]

Every worker takes 15 steps of its own; then all average how far they came, of which each sends 2 bits for 64
of 4,096 elements. What it has not sent stays in its residual, which fades. The lines that matter are marked.
As there, and other than in DiLoCo, the average is taken as it is, without momentum.
With a directory, which all ranks see, it saves every 5 rounds, and goes on from there when it is started
again. The task is made up: a network learns to imitate another one with fixed random weights.

Sources: Douillard et al., "DiLoCo" (2023); Wang et al., "Communication Efficient LLM Pre-training with
SparseLoCo" (2025), section 3.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

import gck  # (1)

ROUNDS, LOCAL_STEPS = 20, 15
COMPRESSOR = gck.ChunkTopK(k=64, chunk_size=4096, value_bits=2, decay=0.95)  # (2)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same two networks on every rank
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)  # its moments stay on their rank
    # (3) The average of what all workers' messages say. "auto" would compress it again from 5 workers on.
    outer = gck.diloco.OuterOptimizer(model, COMPRESSOR, LOCAL_STEPS, algorithm="one_phase")

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    loaded = outer.state.load(folder) if folder else None
    if folder and loaded:
        saved = torch.load(folder / f"round-{loaded.step}-rank-{rank}.pt")
        outer.load_state_dict(saved["outer"])
        inner.load_state_dict(saved["inner"])
        print(f"rank {rank}: goes on from round {loaded.step}")

    for step in range(outer.state.step * LOCAL_STEPS, ROUNDS * LOCAL_STEPS):
        torch.manual_seed(100 * step + rank)  # different data on every rank
        inputs = torch.randn(128, 64)
        with torch.no_grad():
            targets = teacher(inputs)
        loss = mse_loss(model(inputs), targets)
        inner.zero_grad()
        loss.backward()
        inner.step()
        if not outer.step():  # (4)
            continue
        done = outer.state.step
        if folder and done % 5 == 0:
            folder.mkdir(parents=True, exist_ok=True)
            state = {"outer": outer.state_dict(), "inner": inner.state_dict()}
            torch.save(state, folder / f"round-{done}-rank-{rank}.pt")
            outer.state.save(folder)
        if rank == 0 and done % 5 == 0:
            print(f"round {done}: loss {loss.item():.4f}")

    sizes = [p.numel() for p in model.parameters() if outer.state.compressor_of(p)]
    cost = gck.collectives.all_reduce_cost(COMPRESSOR, sizes, world_size, "one_phase")
    dense = gck.collectives.all_reduce_cost(COMPRESSOR, sizes, world_size, "dense")
    digest = parameters_to_vector(model.parameters()).view(torch.int32).sum().item()
    print(
        f"rank {rank}: parameters {digest}; sent {cost.nbytes} bytes of matrices a round, where dense "
        f"training sends {LOCAL_STEPS * dense.nbytes}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
