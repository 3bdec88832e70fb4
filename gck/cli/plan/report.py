"""What a plan says at its end: a table, advice, a picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gck.cli.links import format_rate
from gck.cli.pictures import canvas
from gck.cli.plan.estimate import Estimate, Plan

__all__ = ["advice", "print_table", "to_dict", "write_files"]

WORTH = 1.1  # no model knows it better: what is not so many times faster is as fast
FEW = 0.25  # of the latency: bytes that are not worth saving
RATES = [10 ** (6 + step / 20) for step in range(101)]  # bits a second, of the picture


def print_table(console: Console, plan: Plan) -> None:
    settings, frontier = plan.settings, plan.frontier()
    options: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "caption_justify": "left"}
    table = Table(title=title(plan), caption=_caption(plan), **options)
    table.add_column("", overflow="fold", min_width=21)
    for heading in ("left", "sent by\na rank", "link", "compute", "all-\nreduce", "faster", "pays\nbelow"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        dense = row.compressor is not None and row.cost.algorithm == "dense"
        mark = "" if row.compressor is None else "* " if row in frontier else "  "
        table.add_row(
            Text(f"{mark}{row.name}{': sends dense' if dense else ''}"),
            f"{row.left:.2f}",
            _bytes(row.cost.nbytes),
            _seconds(row.cost.seconds(settings.link())),
            _seconds(row.compute) if row.compute else "",
            _seconds(row.seconds),
            f"{plan.speed_up(row):.1f} x",
            _pays_below(plan, row),
            end_section=row is plan.half,
        )
    console.print(table)


def title(plan: Plan) -> str:
    settings = plan.settings
    return (
        f"{settings.numel:,} elements, {settings.world_size} ranks, {format_rate(settings.bits_per_second)}, "
        f"{settings.latency * 1e3:g} ms"
    )


def advice(plan: Plan) -> str:
    """What to do, in a few sentences; not to compress, where that is best."""
    dense, half, backward = plan.dense, plan.half, plan.settings.backward
    if backward is not None and dense.seconds <= backward:
        return (
            f"Do not compress: a backward pass of {_seconds(backward)} can hide a dense all-reduce of "
            f"{_seconds(dense.seconds)}."
        )
    link = plan.settings.link()
    latency = dense.cost.rounds * link.latency
    if dense.cost.nbytes / link.bandwidth < FEW * latency:
        return (
            f"Do not compress: of {_seconds(dense.seconds)} dense gradients wait {_seconds(latency)} for "
            f"{dense.cost.rounds} messages one after the other, which are no fewer for being short."
            f"{_hierarchy(plan)}"
        )
    parts = []
    frontier = plan.frontier()
    fastest = min((half, *frontier), key=plan.step)
    if plan.step(half) <= WORTH * plan.step(fastest):
        parts.append(
            f"16 bits are enough, with any framework's fp16 hook: {_than(plan, half, dense)}, and nothing "
            f"here is {WORTH} times faster than that."
        )
        enough = half
    elif backward is None or not _hides(plan, fastest):
        what = "All-reduces" if backward is None else "Steps"
        parts.append(
            f"{what} so many times faster than with 16 bits, mildest first: {_named(plan, frontier)}."
        )
        if backward is None:
            parts.append("The first that is fast enough is best: --backward-ms tells which.")
        enough = fastest
    else:
        # Of those that are as good as the fastest, the one that leaves least for later steps.
        good = [row for row in frontier if plan.step(row) <= WORTH * plan.step(fastest)]
        enough = next((row for row in good if WORTH * plan.step(row) <= plan.step(half)), fastest)
        left = f"leaves {enough.left:.2f} of a gradient for later steps"
        parts.append(f"{enough.name}: {_than(plan, enough, half)}, {left}.")
        if milder := [row for row in frontier if row.left < enough.left]:
            parts.append(f"Milder, and slower: {_named(plan, milder[::-1])}.")
    if not _hides(plan, enough):
        parts.append(
            "The backward pass does not hide it: give links more time with a larger batch, or with many "
            "local steps between two reductions (docs/local_steps.md)."
        )
    if latency > 0.5 * dense.seconds:
        parts.append(
            f"Most of a dense all-reduce is latency, of {dense.cost.rounds} messages one after the other."
            f"{_hierarchy(plan)}"
        )
    return " ".join(parts)


def _named(plan: Plan, rows: Sequence[Estimate]) -> str:
    """As "Sign() 14.1 times, leaves 0.36; ...": than with 16 bits."""
    half = plan.step(plan.half)
    return "; ".join(f"{r.name} {half / plan.step(r):.1f} times, leaves {r.left:.2f}" for r in rows)


def _hides(plan: Plan, row: Estimate) -> bool:
    """Whether an all-reduce is as good as hidden behind the backward pass, or none is known."""
    backward = plan.settings.backward
    return backward is None or plan.step(row) <= WORTH * (backward + row.compute)


def _hierarchy(plan: Plan) -> str:
    few = plan.settings.world_size <= 4
    return "" if few else " A hierarchy (gck.HierarchicalGroup) has fewer."


def _than(plan: Plan, row: Estimate, other: Estimate) -> str:
    what = "all-reduces" if plan.settings.backward is None else "steps"
    return f"{what} {plan.step(other) / plan.step(row):.1f} times faster than with {other.name}"


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain numbers: bytes, seconds, bits a second; `pays_below` is null where no link is slow enough."""
    rows, frontier = [], plan.frontier()
    for row in plan.rows:
        fields = asdict(replace(row, compressor=None))
        del fields["compressor"]
        below = None if row.compressor is None else plan.pays_below(row)
        always = below == float("inf")
        step, speed_up = plan.step(row), plan.speed_up(row)
        rows.append(
            {
                **fields,
                "step": step,
                "speed_up": speed_up,
                "pays_below": None if always else below,
                "pays_always": always,
                "frontier": row in frontier,
            }
        )
    return {
        "settings": asdict(plan.settings),
        "measured_on": {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "rows": rows,
        "advice": advice(plan),
    }


def write_files(plan: Plan, out: Path) -> Sequence[Path]:
    """Writes plan.json and plan.png into the folder `out`, which is there, and returns their paths."""
    numbers, picture = out / "plan.json", out / "plan.png"
    numbers.write_text(json.dumps(to_dict(plan), indent=2) + "\n")
    _draw(plan, picture)
    return numbers, picture


def _draw(plan: Plan, path: Path) -> None:
    """All-reduces against the rate of the link, from 1 Mbit/s to 100 Gbit/s."""
    settings = plan.settings
    figure, axes = canvas(8, 5.2)
    for number, row in enumerate(plan.rows):
        style = (
            {"color": "black", "linestyle": "-" if row is plan.dense else "--"}
            if row.compressor is None
            else {"color": f"C{number % 10}"}
        )
        times = [row.seconds_over(settings.link(rate), settings) for rate in RATES]
        axes.loglog([rate / 1e6 for rate in RATES], times, label=row.name, linewidth=1.5, **style)
    axes.axvline(settings.bits_per_second / 1e6, color="#999999", linewidth=1, linestyle=":")
    if settings.backward:
        axes.axhline(settings.backward, color="#999999", linewidth=1, linestyle=":")
        axes.annotate("backward pass", (1.2, settings.backward), fontsize=8, va="bottom", color="#666666")
    axes.set_title(f"{title(plan)}: predicted all-reduce", fontsize=10)
    axes.set_xlabel("link, Mbit/s; dotted: the one asked for")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _caption(plan: Plan) -> str:
    settings, threads = plan.settings, torch.get_num_threads()
    where = {
        "cpu": f"on {threads} thread{'s' if threads > 1 else ''} of this machine",
        "cuda": "on its GPU",
        "none": "left out",
    }[settings.device]
    faster = "all-reduces"
    if settings.backward is not None:
        faster = f"steps, at best, with a backward pass of {_seconds(settings.backward)} to hide behind"
    return (
        "Left: the share of a Gaussian gradient's squares that one step leaves for later ones. Link: bytes "
        f"and latency. Compute: {where}; added to that, or meanwhile where a gradient goes in pieces; none "
        f"counts for dense ones. Faster: {faster}, than with dense fp32. Pays below: the fastest link on "
        "which an all-reduce is no slower than with 16 bits. *: none is both faster and leaves less."
    )


def _pays_below(plan: Plan, row: Estimate) -> str:
    if row.compressor is None:
        return ""
    below = plan.pays_below(row)
    if below is None:
        return "never"
    return "always" if below == float("inf") else format_rate(int(float(f"{below:.2g}"))).replace("bit", "b")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
