"""`python -m bench.gpu_kernels`: on a GPU, what each kernel of a call takes, beside the call and its floor.

The suite (`python -m bench`) says how long a call takes; this says where. Times are of device events, of the
replay of a CUDA graph, and of torch's profiler, kernel by kernel; residuals are restored before each call.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import gck
from bench import bench_quantize, bench_random_k, inputs
from bench.bench_topk_lists import gpt2_sizes
from bench.machine import ROOT, describe
from bench.measure import seconds_of
from gck.wire import body_of, payloads_of

ROUNDS, PROFILED = 15, 5
DEVICE = torch.device("cuda")
WORST_HINT = 0x7F000000  # a key that nothing reaches: the list stays empty, and err is searched


class Look(NamedTuple):
    """A call to look at: `restore` makes its inputs as they were at first."""

    name: str
    n: int
    run: Callable[[], Any]
    restore: Callable[[], Any]
    floor: Callable[[], Any]
    floor_part: float  # of what err.add_(grad) moves, that this must move


def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu-kernels.json.")] = ROOT / "results/gpu-kernels",
    largest: Annotated[int, typer.Option(help="Elements of the largest vector.")] = 100_000_000,
) -> None:
    """Looks into the calls of gck on a GPU."""
    console = Console()
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device")
    records = []
    for look in track(looks(largest), "calls", console=console):
        try:
            records.append(measure(look))
        except Exception as error:  # the others are still worth their time
            records.append({"name": look.name, "n": look.n, "error": f"{type(error).__name__}: {error}"})
    show(records, console)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu-kernels.json"
    path.write_text(json.dumps({"machine": describe(DEVICE), "records": records}, indent=1) + "\n")
    console.print(f"wrote {path}")
    raise typer.Exit(int(any("error" in record for record in records)))


def looks(largest: int) -> Iterator[Look]:
    """The calls, one after another, so that one's tensors can go before the next one's come."""
    for n in (1_000_000, 25_000_000, largest):
        for dtype in (torch.float32, torch.bfloat16):
            grad, err = (x.to(DEVICE) for x in inputs.make(inputs.GAUSSIAN, n))
            grad = grad.to(dtype)
            yield from _of_vectors(grad, err)
    yield from _of_lists()
    yield from _of_payloads(25_000_000)


def _of_vectors(grad: Tensor, err: Tensor) -> Iterator[Look]:
    saved, n = err.clone(), grad.numel()
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[grad.dtype]

    def look(name: str, run: Callable[[], Any], restore: Callable[[], Any] | None = None) -> Look:
        again = restore or (lambda: err.copy_(saved))
        return Look(f"{name}, {kind}", n, run, again, lambda: err.add_(grad), 1.0)

    for ratio in (0.0001, 0.001, 0.01, 0.1):
        yield look(f"topk_ef_ {ratio:.2%}", lambda ratio=ratio: gck.topk_ef_(grad, err, ratio))
    if grad.dtype != torch.float32:
        return
    hint = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    hinted = lambda: gck.topk_ef_(grad, err, 0.01, hint=hint)  # noqa: E731
    yield look("topk_ef_ 1%, hint", hinted)
    yield look("topk_ef_ 1%, worst hint", hinted, lambda: (err.copy_(saved), hint.fill_(WORST_HINT)))
    ones = torch.ones_like(grad)
    yield look("topk_ef_ 1%, constant", lambda: gck.topk_ef_(ones, err, 0.01), err.zero_)
    for bits in (32, 2):
        yield look(
            f"chunk_topk_ef_ {bits} bits", lambda bits=bits: gck.chunk_topk_ef_(grad, err, value_bits=bits)
        )
    for name, options in bench_quantize.SETTINGS.items():
        options = options | {"chunk_size": bench_quantize.CHUNK_SIZE}
        yield look(f"quantize_ef_ {name}", lambda options=options: gck.quantize_ef_(grad, err, **options))
    for ratio in bench_random_k.RATIOS:
        yield look(
            f"random_k_ef_ {ratio:.1%}", lambda ratio=ratio: gck.random_k_ef_(grad, err, ratio, seed=1)
        )
    for size in (64, 256, 4096):
        yield look(f"sign_ef_ {size}", lambda size=size: gck.sign_ef_(grad, err, size))


def _of_lists() -> Iterator[Look]:
    sizes = gpt2_sizes()
    grad, err = (x.to(DEVICE) for x in inputs.make(inputs.GAUSSIAN, sum(sizes)))
    saved, grads, errs = err.clone(), list(grad.split(sizes)), list(err.split(sizes))
    for flat in (False, True):
        yield Look(
            f"topk_ef_ 1% of {len(sizes)} tensors" + ", flat" * flat,
            grad.numel(),
            lambda flat=flat: gck.topk_ef_(grads, errs, 0.01, flat=flat),
            lambda: err.copy_(saved),
            lambda: err.add_(grad),
            1.0,
        )


def _of_payloads(n: int, world: int = 8, ratio: float = 0.01) -> Iterator[Look]:
    sent = []
    for rank in range(world):
        grad, err = (x[:n].to(DEVICE) for x in inputs.make(inputs.GAUSSIAN, n + rank))
        sent.append(gck.topk_ef_(grad, err, ratio))
    # Rows of one tensor, as a gather leaves them: what lies apart would be copied together first.
    rows = torch.stack([body_of(payload.values, payload.indices) for payload in sent])
    payloads = payloads_of(sent[0], rows)
    out = torch.zeros(n, device=DEVICE)
    entries = 8 * world * ratio
    for name, run, dense in (
        ("decompress", lambda: gck.decompress(payloads, out=out), 4),
        ("decompress_add_", lambda: gck.decompress_add_(out, payloads), 8),
    ):
        part = (entries + dense) / 12
        yield Look(
            f"{name} of {world} payloads of {ratio:.0%}", n, run, out.zero_, lambda: err.add_(grad), part
        )


def measure(look: Look) -> dict[str, Any]:
    """Microseconds of a call, of its replay and of its kernels."""
    look.restore()
    look.run()  # compiles
    call = _median(look.run, look.restore)
    floor = _median(look.floor, look.restore) * look.floor_part
    kernels = _kernels(look)
    graph = torch.cuda.CUDAGraph()
    look.restore()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            kept = look.run()
        replay: float | None = _median(graph.replay, look.restore)
        del kept
    except RuntimeError:  # a list whose tables were not there before
        replay = None
    return {
        "name": look.name,
        "n": look.n,
        "call_us": call,
        "graph_us": replay,
        "floor_us": floor,
        "multiple_of_floor": call / floor,
        "kernels_us": kernels,
    }


def _median(run: Callable[[], Any], restore: Callable[[], Any]) -> float:
    samples = []
    for _ in range(ROUNDS):
        restore()
        samples.append(seconds_of(run, DEVICE) * 1e6)
    return statistics.median(samples)


def _kernels(look: Look) -> dict[str, float]:
    """Time of each kernel of the package in one call, its launches added up."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as taken:
        for _ in range(PROFILED):
            look.restore()
            look.run()
        torch.cuda.synchronize()
    found = {e.key: e.device_time_total / PROFILED for e in taken.key_averages() if e.device_time_total}
    return {name: time for name, time in found.items() if name.endswith("_kernel")}


def show(records: list[dict[str, Any]], console: Console) -> None:
    table = Table("call", "n", "us", "graph", "x floor", "kernels")
    for record in records:
        if "error" in record:
            table.add_row(record["name"], f"{record['n']:,}", "", "", "", record["error"][:60])
            continue
        parts = sorted(record["kernels_us"].items(), key=lambda part: -part[1])
        table.add_row(
            record["name"],
            f"{record['n']:,}",
            f"{record['call_us']:.0f}",
            "" if record["graph_us"] is None else f"{record['graph_us']:.0f}",
            f"{record['multiple_of_floor']:.2f}",
            " ".join(f"{name.removesuffix('_kernel')} {time:.0f}" for name, time in parts),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
