"""`python -m bench.scale`: what a rank sends, and how near the result is, in worlds of up to 1024 ranks.

The ranks live in this process, a thread each, so bytes and results are those of real ranks and times are not:
times are predicted, by `gck.collectives.all_reduce_cost`, for links that the table names. A vector of which
1024 ranks fit into one process makes small messages; so the table has predictions for a large one, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import gck
from bench.machine import ROOT, describe
from gck.collectives import Link, SimulatedGroup, all_reduce_cost
from gck.collectives.transports.simulated import SimulatedMember

WORLDS = (8, 64, 256, 1024)
LINKS = {"100 Mbit/s": Link.ethernet(100e6, 0.001), "1 Gbit/s": Link.ethernet(1e9, 0.0002)}
LARGE = 25_000_000
COMPRESSORS: dict[str, tuple[Any, str]] = {
    "dense fp32": (gck.TopK(k=1), "dense"),
    "top-k 1 %": (gck.TopK(ratio=0.01), "one_phase"),
    "random-k 1 %": (gck.RandomK(ratio=0.01, seed=0), "one_phase"),
    "random-k 1 %, seeded": (gck.RandomK(ratio=0.01, seed=0), "seeded"),
    "8 bits": (gck.Quantize(bits=8), "two_phase"),
    "4 bits": (gck.Quantize(bits=4), "two_phase"),
    "2 bits": (gck.Quantize(bits=2), "two_phase"),
    "sign": (gck.Sign(), "two_phase"),
    "top 4 of 256, bf16": (gck.ChunkTopK(k=4, chunk_size=256, value_bits=16), "two_phase"),
    "top 4 of 256, 4 bits": (gck.ChunkTopK(k=4, chunk_size=256, value_bits=4), "two_phase"),
}
MEMORY = 10 << 30  # bytes that all ranks may hold together: they are all here
Record = dict[str, Any]


def held(name: str, world_size: int, numel: int) -> int:
    """Bytes that all ranks hold at once, about: gradient, residual, a copy of either, and their messages."""
    compressor, algorithm = COMPRESSORS[name]
    payload = all_reduce_cost(compressor, [numel], 2, algorithm).nbytes
    return world_size * (4 * 4 * numel + 2 * payload)


def main(
    numel: Annotated[int, typer.Option(help="Elements of the gradient.")] = 1 << 18,
    steps: Annotated[int, typer.Option(help="All-reduces, one after another.")] = 4,
    largest: Annotated[
        int, typer.Option(help="Leave out larger worlds; and what would not fit in memory.")
    ] = 1024,
    out: Annotated[Path, typer.Option(help="Folder for scale.json and scale.png.")] = ROOT / "results/scale",
) -> None:
    """Runs every compressor on every world, and draws what a rank sends."""
    torch.set_num_threads(1)  # each rank is a thread already
    sys.setswitchinterval(0.2)  # by default each of a thousand threads asks for its turn 200 times a second
    console = Console(width=150)
    cases = [(name, world) for world in WORLDS if world <= largest for name in COMPRESSORS]
    cases = [case for case in cases if held(*case, numel) <= MEMORY]
    about = {"machine": describe(torch.device("cpu")), "numel": numel, "large_numel": LARGE, "steps": steps}
    records = [measure(*case, numel, steps) for case in track(cases, "worlds", console=console)]
    show(records, numel, steps, console)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    draw(records, numel, steps, out / "scale.png")
    console.print(f"wrote {out}/scale.json and scale.png", highlight=False)


def gradient(numel: int, world_size: int, rank: int, step: int) -> Tensor:
    """Gradients share a mean that is as large as what each rank has of its own."""
    own = torch.randn(numel, generator=torch.Generator().manual_seed(1 + rank + step * world_size))
    return own.add_(_common(numel))


@lru_cache(maxsize=1)
def _common(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def exact_means(numel: int, world_size: int, steps: int) -> Tensor:
    """(steps, numel) fp64: of all ranks' gradients, added up in doubles."""
    means = torch.zeros(steps, numel, dtype=torch.float64)
    for step in range(steps):
        for rank in range(world_size):
            means[step] += gradient(numel, world_size, rank, step)
    return means.div_(world_size)


def of_step(compressor: Any, step: int) -> Any:
    """The compressor with the seed of a step, where it has one that is another at every step."""
    seeds = {field.name: step for field in fields(compressor) if field.metadata.get("of_a_step")}
    return replace(compressor, **seeds)


def measure(name: str, world_size: int, numel: int, steps: int) -> Record:
    """One compressor on one world."""
    compressor, algorithm = COMPRESSORS[name]
    group = SimulatedGroup(world_size, timeout=600, shared_gathers=True)
    states = [gck.ErrorFeedback() for _ in range(world_size)]

    def train(member: SimulatedMember) -> list[Tensor]:
        results = []
        for step in range(steps):
            grad = gradient(numel, world_size, member.rank, step)
            now = of_step(compressor, step)
            gck.all_reduce_(grad, states[member.rank], now, member, algorithm=algorithm, validate="off")
            results.append(grad if member.rank == 0 else grad.view(torch.int32).sum())
        return results

    found = group.run(train)
    # Of the others a sum of bits is enough: whether they are those of rank 0.
    ours = [result.view(torch.int32).sum() for result in found[0]]
    same = all(all(map(torch.equal, of_rank, ours)) for of_rank in found[1:])
    given, results = exact_means(numel, world_size, steps), torch.stack(found[0]).double()
    cost = all_reduce_cost(compressor, [numel], world_size, algorithm)
    large = all_reduce_cost(compressor, [LARGE], world_size, algorithm)
    return {
        "name": name,
        "world_size": world_size,
        "algorithm": algorithm,
        "nbytes": group.bytes_sent[0] // steps,
        "predicted_nbytes": cost.nbytes,
        "messages": group.messages_sent[0] // steps,
        "rounds": cost.rounds,
        "same_bits": same,
        "error_of_first": _error(results[0], given[0]),
        "error_of_sum": _error(results.sum(0), given.sum(0)),
        "predicted_seconds": {link: cost.seconds(LINKS[link]) for link in LINKS},
        "large_nbytes": large.nbytes,
        "large_seconds": {link: large.seconds(LINKS[link]) for link in LINKS},
    }


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def show(records: Sequence[Record], numel: int, steps: int, console: Console) -> None:
    table = Table(
        title=f"{numel:,} elements, {steps} steps; of one rank and step; and predicted for {LARGE:,} elements"
    )
    columns = ("ranks", "", "sent", "messages", "same bits", "error, step 1", f"of {steps} steps", *LINKS)
    for column in (*columns, "sent, large", *(f"{link}, large" for link in LINKS)):
        table.add_column(column, justify="left" if not column else "right")
    for i, r in enumerate(records):
        table.add_row(
            str(r["world_size"]),
            r["name"],
            f"{r['nbytes'] / 1e3:,.0f} kB",
            str(r["messages"]),
            "yes" if r["same_bits"] else "NO",
            f"{r['error_of_first']:.3f}",
            f"{r['error_of_sum']:.3f}",
            *(f"{1e3 * seconds:,.0f} ms" for seconds in r["predicted_seconds"].values()),
            f"{r['large_nbytes'] / 1e6:,.1f} MB",
            *(f"{seconds:,.2f} s" for seconds in r["large_seconds"].values()),
            end_section=i + 1 == len(records) or records[i + 1]["world_size"] != r["world_size"],
        )
    console.print(table)


def draw(records: Sequence[Record], numel: int, steps: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        f"MB that a rank sends, {numel:,} elements": lambda r: r["nbytes"] / 1e6,
        f"predicted for {LARGE:,} elements": lambda r: r["large_nbytes"] / 1e6,
        "messages that a rank sends": lambda r: r["messages"],
        f"error of the sum of {steps} steps, relative": lambda r: max(r["error_of_sum"], 1e-8),
    }
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axes, (title, value) in zip(grid.flat, panels.items(), strict=True):
        for name in dict.fromkeys(r["name"] for r in records):
            chosen = [r for r in records if r["name"] == name]
            # One phase and dense: dotted; two phases and seeded: solid.
            style = "-" if chosen[0]["algorithm"] in ("two_phase", "seeded") else ":"
            axes.plot(
                [r["world_size"] for r in chosen],
                [value(r) for r in chosen],
                linestyle=style,
                marker="o",
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({r["world_size"] for r in records}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("ranks")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
