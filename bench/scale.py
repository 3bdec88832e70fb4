"""`python -m bench.scale`: what a rank sends, and how near the result is, in worlds of up to 1024 ranks.

The ranks live in this process, a thread each, so bytes and results are those of real ranks and times are not:
times are predicted, by `gck.collectives.all_reduce_cost`, for links that the table names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
LINKS = {"100 Mbit/s": Link(0.001, 12.5e6), "1 Gbit/s": Link(0.0002, 125e6)}
COMPRESSORS: dict[str, tuple[Any, str]] = {
    "dense fp32": (gck.TopK(k=1), "dense"),
    "top-k 1 %": (gck.TopK(ratio=0.01), "one_phase"),
    "sign, 256": (gck.Sign(), "two_phase"),
    "4 bits, 256": (gck.Quantize(bits=4), "two_phase"),
    "top 4 of 256": (gck.ChunkTopK(k=4, chunk_size=256, value_bits=16), "two_phase"),
}
MEMORY = 8 << 30  # bytes that all ranks may receive together: they are all here
Record = dict[str, Any]


def received(name: str, world_size: int, numel: int) -> int:
    """Bytes that all ranks hold at once in the heaviest case: a gather of every payload on every rank."""
    compressor, algorithm = COMPRESSORS[name]
    return world_size * all_reduce_cost(compressor, [numel], world_size, algorithm).nbytes


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
    console = Console(width=120)
    cases = [(name, world) for world in WORLDS if world <= largest for name in COMPRESSORS]
    cases = [case for case in cases if received(*case, numel) <= MEMORY]
    records = [measure(*case, numel, steps) for case in track(cases, "worlds", console=console)]
    show(records, numel, steps, console)
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe(torch.device("cpu")), "numel": numel, "steps": steps, "records": records}
    (out / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(records, numel, out / "scale.png")
    console.print(f"wrote {out}/scale.json and scale.png", highlight=False)


def measure(name: str, world_size: int, numel: int, steps: int) -> Record:
    """Gradients share a mean that is as large as what each rank has of its own."""
    compressor, algorithm = COMPRESSORS[name]
    group = SimulatedGroup(world_size, timeout=600)
    states = [gck.ErrorFeedback() for _ in range(world_size)]
    common = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    # Added up in doubles, over ranks and steps, once each.
    given = torch.zeros(steps, numel, dtype=torch.float64)

    def grad_of(rank: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + rank + step * world_size)
        return common + torch.randn(numel, generator=generator)

    def train(member: SimulatedMember) -> list[Tensor]:
        results = []
        for step in range(steps):
            grad = grad_of(member.rank, step)
            gck.all_reduce_(
                grad, states[member.rank], compressor, member, algorithm=algorithm, validate="off"
            )
            results.append(grad if member.rank == 0 else grad.view(torch.int32).sum())
        return results

    found = group.run(train)
    # Of the others a sum of bits is enough: whether they are those of rank 0.
    ours = [result.view(torch.int32).sum() for result in found[0]]
    same = all(all(map(torch.equal, of_rank, ours)) for of_rank in found[1:])
    for step in range(steps):
        for rank in range(world_size):
            given[step] += grad_of(rank, step)
    given /= world_size
    results = torch.stack(found[0]).double()
    cost = all_reduce_cost(compressor, [numel], world_size, algorithm)
    return {
        "name": name,
        "world_size": world_size,
        "algorithm": algorithm,
        "nbytes": group.bytes_sent[0] // steps,
        "predicted_nbytes": cost.nbytes,
        "messages": cost.messages,
        "rounds": cost.rounds,
        "same_bits": same,
        "error_of_first": _error(results[0], given[0]),
        "error_of_sum": _error(results.sum(0), given.sum(0)),
        "predicted_seconds": {link: cost.seconds(LINKS[link]) for link in LINKS},
    }


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def show(records: Sequence[Record], numel: int, steps: int, console: Console) -> None:
    table = Table(title=f"{numel:,} elements, {steps} steps; of one rank and step")
    for column in (
        "ranks",
        "",
        "sent",
        "messages",
        "same bits",
        "error, step 1",
        f"of {steps} steps",
        *LINKS,
    ):
        table.add_column(column, justify="left" if not column else "right")
    for r in records:
        times = [f"{1e3 * seconds:.0f} ms" for seconds in r["predicted_seconds"].values()]
        cells = (r["name"], f"{r['nbytes'] / 1e3:,.0f} kB", r["messages"], "yes" if r["same_bits"] else "NO")
        errors = (f"{r['error_of_first']:.3f}", f"{r['error_of_sum']:.3f}")
        table.add_row(*map(str, (r["world_size"], *cells, *errors, *times)))
    console.print(table)


def draw(records: Sequence[Record], numel: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(r["name"] for r in records):
        chosen = [r for r in records if r["name"] == name]
        worlds = [r["world_size"] for r in chosen]
        panels[0].plot(worlds, [r["nbytes"] / 1e6 for r in chosen], marker="o", label=name)
        panels[1].plot(worlds, [max(r["error_of_sum"], 1e-8) for r in chosen], marker="o", label=name)
    titles = ("MB that a rank sends in a step", "error of the sum of all steps, relative")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{numel:,} elements", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
