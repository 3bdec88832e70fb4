"""Data-parallel training with CuPy: gck's kernels and NCCL on CuPy's arrays and stream, no torch.distributed.

    python examples/cupy_nccl.py

Needs CuPy and NCCL: `pip install ".[cuda12]"`, or cuda13. A process a GPU. Each sends the largest tenth of
its gradient, and keeps the rest for later. The task is made up: linear regression, whose weights are known.
"""

import multiprocessing
from multiprocessing.connection import Connection

import cupy
import numpy
import torch

import gck

STEPS, INPUTS, BATCH, RATE = 200, 256, 256, 0.1


def main(rank: int, world_size: int, pipe: Connection) -> None:
    torch.cuda.set_device(rank)  # where NCCL and gck's kernels go
    cupy.cuda.Device(rank).use()
    random = numpy.random.default_rng(0)
    known = random.standard_normal(INPUTS, dtype=numpy.float32)
    random = numpy.random.default_rng(1 + rank)  # different data on every rank

    stream = cupy.cuda.Stream(non_blocking=True)
    # Arrays are worked on in CuPy's current stream. A payload's fields are tensors, which go by torch's: that
    # is made the same one.
    with (
        gck.NcclCommunicator(pipe.recv_bytes(), rank, world_size, timeout=60) as comm,
        stream,
        torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)),
    ):
        wanted = cupy.asarray(known)
        weights, err, total = (cupy.zeros(INPUTS, dtype=cupy.float32) for _ in range(3))
        for step in range(1, STEPS + 1):
            inputs = cupy.asarray(random.standard_normal((BATCH, INPUTS), dtype=numpy.float32))
            wrong = (inputs * (weights - wanted)).sum(axis=1)
            grad = (inputs * wrong[:, None]).mean(axis=0)

            payload = gck.topk_ef_(grad, err, ratio=0.1)
            payloads = comm.sparse_all_gather(payload)  # every rank's, without a wait
            gck.decompress(payloads, out=total)  # their sum
            weights -= RATE / world_size * total

            if step == 1 or step % 40 == 0:
                comm.synchronize()  # as `float` would, but never longer than the timeout
                print(f"rank {rank}, step {step}: loss {float((wrong * wrong).mean()):.6f}")


if __name__ == "__main__":
    world_size = cupy.cuda.runtime.getDeviceCount()
    unique_id = gck.NcclCommunicator.create_unique_id()
    context = multiprocessing.get_context("spawn")
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        ranks.append(context.Process(target=main, args=(rank, world_size, theirs)))
        ranks[-1].start()
        ours.send_bytes(unique_id)
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")
