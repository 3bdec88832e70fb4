"""`python -m bench.pipeline`: the two-phase all-reduce in pieces of several sizes, on several links.

Every rank is a process with one thread to compute, behind a link of its own (see `gck.cli.links`); on
"loopback", and where links cannot be made, they share bare loopback.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.machine import ROOT, describe
from bench.pipeline_worker import COMPRESSORS
from gck.cli.crew import crew
from gck.cli.links import parse_rate
from gck.cli.network import Network, join
from gck.collectives import Link, all_reduce_cost, choose_piece_numel

LOOPBACK = "loopback"
Record = dict[str, Any]


def main(
    link: Annotated[list[str], typer.Option(help="Rate of a link, or loopback. May be repeated.")] = [  # noqa: B006
        "100mbit",
        "1gbit",
        LOOPBACK,
    ],
    numel: Annotated[list[int], typer.Option(help="Elements of the gradient. May be repeated.")] = [4 << 20],  # noqa: B006
    pieces: Annotated[
        str, typer.Option(help="In how many pieces; 1 is all at once. Separated by commas.")
    ] = "1,2,4,8,16",
    compressor: Annotated[list[str], typer.Option(help="May be repeated.")] = list(COMPRESSORS),  # noqa: B006
    ranks: Annotated[int, typer.Option(help="Processes.")] = 4,
    repeats: Annotated[int, typer.Option(help="Of every case; the median counts.")] = 9,
    limit: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder for pipeline.json.")] = ROOT / "results/pipeline",
) -> None:
    """Measures every compressor, size and link, and compares the bits."""
    console = Console(width=120)
    counts = [int(count) for count in pieces.split(",")]
    records: list[Record] = []
    with Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(link) * len(numel) * len(compressor))
        for rate in link:
            for size in numel:
                for record in measure(rate, size, compressor, counts, ranks, repeats, limit):
                    records.append(record)
                    progress.advance(task)
    show(records, ranks, counts, console)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": describe(torch.device("cpu")),
        "ranks": ranks,
        "repeats": repeats,
        "records": records,
    }
    (out / "pipeline.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {out}/pipeline.json", highlight=False)


def measure(
    rate: str,
    numel: int,
    names: Sequence[str],
    counts: Sequence[int],
    ranks: int,
    repeats: int,
    limit: float,
) -> Iterator[Record]:
    """Every compressor on one link and size."""
    piece_numels = [0 if count == 1 else -(-numel // count) for count in counts]
    with (
        tempfile.TemporaryDirectory(prefix="gck-pipeline-") as folder,
        join(ranks, None if rate == LOOPBACK else rate) as network,
    ):
        commands = []
        for rank in range(ranks):
            assignment = {
                "rank": rank,
                "world_size": ranks,
                "parent": os.getpid(),
                "folder": folder,
                "interface": network.interface,
                "pieces": piece_numels,
                "repeats": repeats,
                "cases": [{"name": name, "numel": numel} for name in names],
            }
            argv = [sys.executable, "-m", "bench.pipeline_worker", json.dumps(assignment)]
            commands.append(network.command(rank, argv))
        environment = {"GLOO_SOCKET_IFNAME": network.interface, "PYTHONPATH": str(ROOT)}
        done: list[list[Record]] = [[] for _ in names]
        with crew(commands, environment, Path(folder)) as workers:
            heard = [0] * ranks
            for rank, report in workers.events(limit):
                if report.pop("event") != "done":
                    continue
                case = heard[rank]
                heard[rank] += 1
                done[case].append(report)
                if len(done[case]) == ranks:
                    yield _record(network, names[case], numel, piece_numels, done[case])


def _record(
    network: Network, name: str, numel: int, piece_numels: Sequence[int], reports: Sequence[Record]
) -> Record:
    """An all-reduce has ended when its last rank has."""
    times = []
    for piece in range(len(piece_numels)):
        repeats = zip(*(report["seconds"][piece] for report in reports), strict=True)
        times.append([max(ranks) for ranks in repeats])
    ranks = len(reports)
    cost = all_reduce_cost(COMPRESSORS[name], [numel], ranks, "two_phase")
    bandwidth = None if network.rate is None else parse_rate(network.rate) / 8
    return {
        "link": network.rate or LOOPBACK,
        "network": network.reason,  # why there are no links, where there should be
        "name": name,
        "numel": numel,
        "piece_numels": list(piece_numels),
        "chosen": choose_piece_numel(
            COMPRESSORS[name],
            numel,
            ranks,
            link=None if network.rate is None else Link.ethernet(parse_rate(network.rate)),
            algorithm="two_phase",
        ),
        "seconds": [statistics.median(each) for each in times],
        "all_seconds": times,
        "sent": max(report["sent"][0] for report in reports),
        "nbytes": cost.nbytes,
        "ideal_seconds": None if bandwidth is None else cost.seconds(Link(0, bandwidth)),
        "same_bits": all(report["same_bits"] for report in reports),
    }


def show(records: Sequence[Record], ranks: int, counts: Sequence[int], console: Console) -> None:
    table = Table(title=f"{ranks} ranks: milliseconds by number of pieces (* chosen for the link)")
    for column in ("link", "", "elements", "bytes / bandwidth", *map(str, counts), "same bits"):
        table.add_column(column, justify="left" if not column else "right")
    for r in records:
        ideal = "" if r["ideal_seconds"] is None else f"{1e3 * r['ideal_seconds']:.0f}"
        cells = []
        for piece, seconds in zip(r["piece_numels"], r["seconds"], strict=True):
            cells.append(f"{1e3 * seconds:.1f}{'*' if piece == r['chosen'] else ''}")
        same = "yes" if r["same_bits"] else "NO"
        table.add_row(r["link"], r["name"], f"{r['numel']:,}", ideal, *cells, same)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
