"""One rank of test_arrays.py: CuPy's arrays, on a CuPy stream that waits for no other."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench.nccl.one_device import environment

if __name__ == "__main__":
    os.environ |= environment(int(os.environ["RANK"]))

import cupy
import torch

import gck
from tests.collectives import launcher, scenarios
from tests.nccl.array_calls import CALLS, NUMEL, digest, sign, sparse

CYCLES = 1_000_000_000  # about half a second


def on_stream(
    stream: Any, comm: gck.NcclCommunicator, call: Callable[..., list[Any]], cycles: int
) -> tuple[str, bool]:
    """Digest of what `call` returns, and whether the stream was still busy when it did.

    The gradient is written on CuPy's stream behind a kernel of `cycles`: whoever does not wait for that reads
    zeros. Torch's current stream is another one, but where payloads are sent, whose fields are tensors.
    """
    source = cupy.asarray(scenarios.gradient(comm.rank, NUMEL).to(comm.device))
    grad = cupy.zeros_like(source)
    torch.cuda.synchronize()
    external = torch.cuda.ExternalStream(stream.ptr)
    with stream:
        with torch.cuda.stream(external):
            torch.cuda._sleep(cycles)
        cupy.copyto(grad, source)
        with torch.cuda.stream(external if call in (sparse, sign) else torch.cuda.Stream()):
            results = call(cupy, comm, grad)
        busy = not stream.done
        comm.synchronize()
        stream.synchronize()
        return digest(*results), busy


if __name__ == "__main__":
    directory, rank, world_size = launcher.init(timeout=120)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    cupy.cuda.Device(device.index).use()
    stream, report = cupy.cuda.Stream(non_blocking=True), {}
    with gck.NcclCommunicator.from_group(timeout=60) as comm:
        for call in CALLS:
            # The first compiles, connects and allocates, any of which may wait for the device.
            first, _ = on_stream(stream, comm, call, 1)
            again, busy = on_stream(stream, comm, call, CYCLES)
            report[call.__name__] = {"first": first, "again": again, "busy": busy}
    launcher.report(directory, rank, report)
    launcher.leave()
