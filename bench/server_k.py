"""`python -m bench.server_k`: what the second phase of chunk top-k must keep for training to lose nothing.

Sixteen ranks, simulated in this process, train the demo's network on its digits. Most images of a rank show
two digits of its own, so that ranks disagree on which entries are large. The same training runs with a
second phase that keeps 1, 2, 4 and 8 times as many entries of a chunk as the first, and beside them with one
phase, which leaves out nothing of a sum, and dense.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import gck
from bench.machine import ROOT, describe
from gck.cli.demo.model import Images, build_model, load_images, save_images
from gck.cli.demo.settings import Settings
from gck.collectives import SimulatedGroup, all_reduce_cost

FACTORS = (1, 2, 4, 8)
CHUNK_SIZE = 4096
SEEDS = 3
DIGITS_OF_A_RANK = 2  # most of its images show one of these
Record = dict[str, Any]


def cases(k: int) -> dict[str, tuple[gck.ChunkTopK, str]]:
    """What is compared, by name: a compressor and an algorithm."""
    plain = gck.ChunkTopK(k, CHUNK_SIZE)
    two = {
        f"two phases, server_k = {f if f > 1 else ''}k": gck.ChunkTopK(k, CHUNK_SIZE, server_k=f * k)
        for f in FACTORS
    }
    return {
        **{name: (compressor, "two_phase") for name, compressor in two.items()},
        "one phase": (plain, "one_phase"),
        "dense": (plain, "dense"),
    }


def main(
    k: Annotated[int, typer.Option(help="Entries that a rank keeps of a chunk of 4096.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 100,
    seeds: Annotated[int, typer.Option(help="Trainings of each kind.")] = SEEDS,
    world_size: Annotated[int, typer.Option(help="Simulated ranks.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for server_k.json and server_k.png.")] = ROOT
    / "results/server_k",
) -> None:
    """Trains, shows a table, and draws it."""
    torch.set_num_threads(1)
    console = Console(width=120)
    settings = Settings(workers=world_size, steps=steps, batch=8)
    with tempfile.TemporaryDirectory() as folder:
        save_images(Path(folder) / "digits")
        images, test = load_images(Path(folder) / "digits")
    machine, begun = describe(torch.device("cpu")), time.monotonic()
    plan = [(name, seed) for seed in range(seeds) for name in cases(k)]
    runs: dict[str, list[Record]] = {name: [] for name in cases(k)}
    for name, seed in track(plan, "trainings", console=console):
        runs[name].append(train(*cases(k)[name], settings, seed, images, test))
    numel = sum(parameter.numel() for parameter in build_model().parameters())
    records = [summary(name, *cases(k)[name], numel, world_size, found) for name, found in runs.items()]
    show(records, k, numel, settings, console)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "seconds": round(time.monotonic() - begun),
        "k": k,
        "chunk_size": CHUNK_SIZE,
        "numel": numel,
        "world_size": world_size,
        "steps": steps,
        "records": records,
    }
    (out / "server_k.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(records, k, settings, out / "server_k.png")
    console.print(f"wrote {out}/server_k.json and server_k.png", highlight=False)


def train(
    compressor: gck.ChunkTopK, algorithm: str, settings: Settings, seed: int, images: Images, test: Images
) -> Record:
    """One training: what the network makes of the test images after its last step.

    The ranks share one network, which all of them would end a step with anyway: they get the same bits.
    """
    torch.manual_seed(seed)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), momentum=settings.momentum)
    group = SimulatedGroup(settings.workers, timeout=300)
    states = [gck.ErrorFeedback() for _ in range(settings.workers)]
    grads = torch.empty(settings.workers, sum(p.numel() for p in model.parameters()))
    order = batches(images.labels, settings, seed)
    for step in range(1, settings.steps + 1):
        for rank, grad in enumerate(grads):
            mine = order[step - 1, rank]
            loss = cross_entropy(model(images.pixels[mine]), images.labels[mine])
            parts = torch.autograd.grad(loss, list(model.parameters()))
            torch.cat([part.reshape(-1) for part in parts], out=grad)
        group.run(
            lambda member: gck.all_reduce_(
                grads[member.rank],
                states[member.rank],
                compressor,
                member,
                algorithm=algorithm,
                validate="off",
            )
        )
        if not all(torch.equal(grad, grads[0]) for grad in grads[1:]):
            raise RuntimeError(f"ranks differ after step {step} of {compressor} by {algorithm}")
        sizes = [parameter.numel() for parameter in model.parameters()]
        for parameter, part in zip(model.parameters(), grads[0].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        optimizer.step()
    with torch.no_grad():
        scores = model(test.pixels)
    return {
        "seed": seed,
        "loss": cross_entropy(scores, test.labels).item(),
        "accuracy": (scores.argmax(1) == test.labels).double().mean().item(),
    }


def batches(labels: Tensor, settings: Settings, seed: int) -> Tensor:
    """(steps, workers, batch) image numbers; of each rank's, seven of eight show its own digits."""
    generator = torch.Generator().manual_seed(1000 + seed)
    everything, chosen = torch.arange(len(labels)), []
    for rank in range(settings.workers):
        digits = [(rank + 3 * i) % 10 for i in range(DIGITS_OF_A_RANK)]
        own = everything[torch.isin(labels, torch.tensor(digits))]
        draws = settings.steps * settings.batch
        pick = own[torch.randint(len(own), (draws,), generator=generator)]
        other = torch.randint(len(labels), (draws,), generator=generator)
        rare = torch.rand(draws, generator=generator) < 1 / 8
        chosen.append(torch.where(rare, other, pick).view(settings.steps, settings.batch))
    return torch.stack(chosen, 1)


def summary(
    name: str, compressor: gck.ChunkTopK, algorithm: str, numel: int, world_size: int, runs: Sequence[Record]
) -> Record:
    def spread(key: str) -> dict[str, float]:
        values = [run[key] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": statistics.fmean(values), "standard_deviation": deviation}

    return {
        "name": name,
        "algorithm": algorithm,
        "nbytes": all_reduce_cost(compressor, [numel], world_size, algorithm).nbytes,
        "loss": spread("loss"),
        "accuracy": spread("accuracy"),
        "runs": list(runs),
    }


def show(records: Sequence[Record], k: int, numel: int, settings: Settings, console: Console) -> None:
    seeds = len(records[0]["runs"])
    title = (
        f"{settings.workers} ranks, {numel:,} elements, {k} of {CHUNK_SIZE}, {settings.steps} steps; mean "
        f"and standard deviation of {seeds} seeds"
    )
    table = Table(title=title)
    for column in ("", "a rank sends in a step", "loss", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for r in records:
        loss, accuracy = r["loss"], r["accuracy"]
        table.add_row(
            r["name"],
            f"{r['nbytes'] / 1e3:,.1f} kB",
            f"{loss['mean']:.3f} ± {loss['standard_deviation']:.3f}",
            f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['standard_deviation']:.2f} %",
        )
    console.print(table)


def draw(records: Sequence[Record], k: int, settings: Settings, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
    for axes, key, factor, label in (
        (panels[0], "loss", 1, "loss on the test images"),
        (panels[1], "accuracy", 100, "accuracy on the test images, %"),
    ):
        for place, r in enumerate(records):
            mean, deviation = (factor * r[key][name] for name in ("mean", "standard_deviation"))
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color="#2a6fdb", capsize=3)
            axes.scatter(
                [factor * run[key] for run in r["runs"]], [place] * len(r["runs"]), s=8, color="#8d8d8d"
            )
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(records)), [r["name"] for r in records], fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(f"{settings.workers} ranks, {k} of {CHUNK_SIZE}, {settings.steps} steps", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
