"""`python -m bench.overlap`: step time of the DDP hook with and without overlap, on a shaped link.

Two workers, each behind a link of its own (`gck.cli.links`), joined by gloo, train a stack of square layers,
a bucket each. What a layer's backward pass takes is either spent "elsewhere", as on a GPU: the thread sleeps;
or on the "same cores" as compression and the transport's threads: a real matrix product of about that time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gck
from bench.machine import ROOT, describe
from gck.cli.crew import crew, end_with, event_stream, tell
from gck.cli.network import join
from gck.integrations import ddp

WORKERS, LAYERS, WIDTH = 2, 8, 1024
COMPRESSORS = {"sign": gck.Sign(), "top-k 1 %": gck.TopK(ratio=0.01)}
Record = dict[str, Any]


class Sleep(torch.autograd.Function):
    """The identity, whose backward pass takes `seconds` in which the processor is free."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class Stack(nn.Module):
    """Square layers; each waits `seconds` in the backward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(Sleep.apply(x, self.seconds) if self.seconds else x)
        return x


def batch_of(seconds: float) -> int:
    """Rows whose matrix products in a layer's backward pass, two of them, take about `seconds`."""
    x, weight = torch.randn(64, WIDTH), torch.randn(WIDTH, WIDTH)
    for _ in range(3):
        began = time.perf_counter()
        _ = x @ weight, x.t() @ x
        taken = time.perf_counter() - began
    return max(1, round(64 * seconds / taken))


def worker(rank: int, parent: int, folder: str, seconds: float, steps: int) -> None:
    """One rank: a report for each way of computing and each compressor."""
    end_with(parent)
    events = event_stream()
    torch.set_num_threads(1)  # a processor each
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=WORKERS,
        timeout=timedelta(seconds=60),
    )
    rows = torch.tensor([batch_of(seconds)])
    dist.broadcast(rows, 0)
    for compute, asleep, batch in (("elsewhere", seconds, 1), ("same cores", 0.0, int(rows))):
        x = torch.randn(batch, WIDTH)
        for name, compressor in COMPRESSORS.items():
            models, states = {}, []
            for overlap in (False, True):
                torch.manual_seed(0)
                models[overlap] = DistributedDataParallel(Stack(asleep), bucket_cap_mb=1)
                states.append(ddp.register(models[overlap], compressor, overlap=overlap))
            times: dict[bool, list[float]] = {False: [], True: []}
            alone = []
            for step in range(steps + 2):
                for overlap, model in models.items():
                    dist.barrier()
                    began = time.perf_counter()
                    model(x).square().mean().backward()
                    if step >= 2:  # DDP cuts its buckets after the first
                        times[overlap].append(time.perf_counter() - began)
                with models[False].no_sync():
                    began = time.perf_counter()
                    models[False](x).square().mean().backward()
                    alone.append(time.perf_counter() - began)
                for model in models.values():
                    model.zero_grad()
            for layer, residuals in states[0].residuals.items():
                if not torch.equal(residuals.worker, states[1].residuals[layer].worker):
                    raise RuntimeError(f"the residuals of {layer} differ")
            record = {
                "compute": compute,
                "compressor": name,
                "alone": statistics.median(alone),
                "in turn": statistics.median(times[False]),
                "overlapped": statistics.median(times[True]),
            }
            if rank == 0:
                tell(events, event="record", **record)
            del models, states
    dist.barrier()  # nobody may leave while another still talks to it
    events.close()
    sys.stderr.flush()
    os._exit(0)  # `destroy_process_group` may hang


def main(
    rate: Annotated[str, typer.Option(help="Of each direction of each link.")] = "100mbit",
    seconds: Annotated[float, typer.Option(help="What a layer's backward pass takes.")] = 0.02,
    steps: Annotated[int, typer.Option(help="Timed steps each.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for overlap.json.")] = ROOT / "results/overlap",
) -> None:
    """Runs both workers and prints the table."""
    console, records = Console(width=120), []
    with tempfile.TemporaryDirectory(prefix="gck-overlap-") as folder, join(WORKERS, rate) as network:
        if network.reason:
            console.print(f"bare loopback, not {rate}: {network.reason}")
        commands = []
        for rank in range(WORKERS):
            assignment = [rank, os.getpid(), folder, seconds, steps]
            argv = [sys.executable, "-m", "bench.overlap", "--worker", json.dumps(assignment)]
            commands.append(network.command(rank, argv))
        environment = {"GLOO_SOCKET_IFNAME": network.interface, "PYTHONPATH": str(ROOT)}
        with crew(commands, environment, Path(folder)) as workers:
            for _, event in workers.events(300):
                records.append({key: value for key, value in event.items() if key != "event"})
    show(records, network.rate or "bare loopback", console)
    out.mkdir(parents=True, exist_ok=True)
    about = {"machine": describe(torch.device("cpu")), "seconds": seconds, "steps": steps}
    report = {**about, "rate": network.rate, "records": records}
    (out / "overlap.json").write_text(json.dumps(report, indent=1) + "\n")


def show(records: list[Record], rate: str, console: Console) -> None:
    table = Table(title=f"{WORKERS} workers, {LAYERS} layers of {WIDTH} x {WIDTH}, {rate}: ms a step, median")
    for column in ("compute", "compressor", "alone", "in turn", "overlapped", "saved"):
        table.add_column(column, justify="left" if column in ("compute", "compressor") else "right")
    for record in records:
        saved = 1 - record["overlapped"] / record["in turn"]
        cells = [f"{1000 * record[key]:.0f}" for key in ("alone", "in turn", "overlapped")]
        table.add_row(record["compute"], record["compressor"], *cells, f"{saved:.0%}")
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    typer.run(main)
