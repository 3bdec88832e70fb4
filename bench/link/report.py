"""Records, tables and the picture of `python -m bench.link`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.link.methods import BASELINE, METHODS
from gck.cli.links import default_burst, format_rate, parse_rate
from gck.cli.network import Network
from gck.collectives import Link, all_reduce_cost
from gck.collectives.pieces import count_pieces

__all__ = ["draw", "goodput", "record_of", "show"]

Record = dict[str, Any]
MEGA = 1e6
# Of an Ethernet frame of 1514 bytes, which is what tc counts, TCP's stream gets 1448.
TCP_SHARE = 1448 / 1514
COLUMNS = (
    "elements", "", "time", "spread", "ideal", "over ideal", "predicted", "over predicted", "payload", "wire",
    "algbw", "busbw", "x dense",
)  # fmt: skip


def goodput(network: Network) -> float:
    """Bytes a second that a link can carry for those who send over TCP, without its acknowledgements."""
    return (network.nodes[0].bits_per_second or 0) / 8 * TCP_SHARE


def record_of(
    event: Record, workers: int, network: Network, latency: float, burst: int | None = None
) -> Record:
    """What is known of one case.

    algbw and busbw are those of nccl-tests: bytes of the fp32 gradient over the time, and that times
    2 (W - 1) / W.

    Args:
        latency: seconds of a round of small messages, measured on the same links.
        burst: bytes that a link lets through at once. None: as many as links have by default.
    """
    if network.nodes and burst is None:
        burst = default_burst(network.nodes[0].bits_per_second or 0)
    numel, seconds = event["numel"], statistics.median(event["seconds"])
    nbytes = METHODS[event["method"]].nbytes(numel, workers)
    return {
        "method": event["method"],
        "numel": numel,
        "workers": workers,
        "rate": network.rate,
        "network": network.reason,
        "seconds": seconds,
        "all_seconds": event["seconds"],
        "nbytes": nbytes,
        "wire_bytes": event["wire_bytes"],
        "burst": burst,
        "ideal_seconds": nbytes / goodput(network) if network.nodes else None,
        "predicted": predicted(event, workers, network, latency, burst or 0),
        "algbw": 4 * numel / seconds,
        "busbw": 4 * numel / seconds * 2 * (workers - 1) / workers,
    }


def predicted(event: Record, workers: int, network: Network, latency: float, burst: int) -> Record | None:
    """The terms of the cost model, in seconds, and its time; None where there is no link, or no model."""
    method = METHODS[event["method"]]
    if not network.nodes or method.compressor is None:
        return None
    link = Link.ethernet(network.nodes[0].bits_per_second or 0, latency, burst=burst)
    numel = event["numel"]
    cost = all_reduce_cost(method.compressor, [numel], workers, method.algorithm)
    pieces = count_pieces(method.compressor, numel, workers, link, cost.algorithm)
    return {
        "latency": cost.rounds * latency,
        "bytes": cost.nbytes / link.bandwidth,
        "compute": event["compute"],
        "at_once": min(burst, cost.nbytes) / link.bandwidth,
        "pieces": pieces,
        "seconds": cost.seconds(link, event["compute"], pieces),
    }


def baseline(record: Record, records: Sequence[Record]) -> Record | None:
    keys = ("numel", "workers", "rate")
    found = (r for r in records if r["method"] == BASELINE and all(r[key] == record[key] for key in keys))
    return next(found, None)


def show(records: Sequence[Record], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right")
    for i, r in enumerate(records):
        dense, times = baseline(r, records), r["all_seconds"]
        ideal, guess = r["ideal_seconds"], r["predicted"]
        last = i + 1 == len(records) or records[i + 1]["numel"] != r["numel"]
        table.add_row(
            f"{r['numel']:,}",
            r["method"],
            f"{1e3 * r['seconds']:.1f} ms",
            f"{1e3 * (max(times) - min(times)):.1f}",
            "" if ideal is None else f"{1e3 * ideal:.1f} ms",
            "" if ideal is None else f"{r['seconds'] / ideal:.2f}",
            "" if guess is None else f"{1e3 * guess['seconds']:.1f} ms",
            "" if guess is None else f"{r['seconds'] / guess['seconds']:.2f}",
            f"{r['nbytes'] / MEGA:.3f} MB",
            f"{r['wire_bytes'] / MEGA:.3f} MB",
            f"{r['algbw'] / MEGA:,.0f} MB/s",
            f"{r['busbw'] / MEGA:,.0f} MB/s",
            "" if dense is None else f"{dense['seconds'] / r['seconds']:.2f}",
            end_section=last,
        )
    console.print(table)


def draw(records: Sequence[Record], path: Path) -> None:
    """A panel a network, at the largest size: times as bars, the ideal as a line on each."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    largest = max(r["numel"] for r in records)
    networks = list(dict.fromkeys((r["rate"], r["workers"]) for r in records))
    methods = list(dict.fromkeys(r["method"] for r in records))
    figure, grid = plt.subplots(
        1,
        len(networks),
        figsize=(2.2 + 3.2 * len(networks), 1 + 0.32 * len(methods)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, (rate, workers) in zip(grid[0], networks, strict=True):
        chosen = [r for r in records if (r["rate"], r["workers"], r["numel"]) == (rate, workers, largest)]
        for r in chosen:
            place = methods.index(r["method"])
            color = "#2a6fdb" if r["method"].startswith("gck") else "#8d8d8d"
            axes.barh(place, r["seconds"], color=color, height=0.7)
            if r["ideal_seconds"] is not None:
                axes.plot([r["ideal_seconds"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.4)
            label = f" {r['seconds']:.3g} s"
            axes.annotate(label, (r["seconds"], place), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.margins(x=0.25)
        name = "bare loopback" if rate is None else format_rate(parse_rate(rate))
        axes.set_title(f"{workers} workers, {name}", fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(methods)), methods, fontsize=7.5)
    grid[0][0].invert_yaxis()
    figure.suptitle(f"all-reduce of {largest:,} elements; black: payload over the rate", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
