"""`python -m bench.guess_trials`: how often a guess from a sample fails, and what it would cost to be bolder.

The rule of bindings/cpu/topk_guess.cpp is repeated here in NumPy, so that thousands of samples can be drawn
of one input: trial t draws the lines that the compiled rule would draw with `draw = t`. Beside it are a
margin that takes entries for independent, and lines that lie evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import inputs

Keys = npt.NDArray[np.int32]
SKIPPED = ("large where sampled", "small where sampled", "large in both samples", "small in both samples")


@dataclass
class Outcome:
    """Of all trials: guesses too high, guesses so low that the list overflows, mean length over k."""

    short: int = 0
    overflowed: int = 0
    listed: float = 0.0


def clustered(above: npt.NDArray[np.bool_]) -> float:
    return 5 * float(np.sqrt((above.sum(1).astype(np.float64) ** 2).sum())) + 8


def independent(above: npt.NDArray[np.bool_]) -> float:
    return 5 * float(np.sqrt(above.sum())) + 8


def guess(sample: Keys, n: int, k: int, margin: Callable[[npt.NDArray[np.bool_]], float]) -> tuple[int, bool]:
    """(threshold, whether entries just below it are counted): `guess_by_sample`, of (lines, 16) keys."""
    size, descending = sample.size, np.sort(sample.ravel())[::-1]
    expected = k / n * size

    def of_rank(rank: float) -> int:
        return int(descending[int(min(max(np.ceil(rank), 1), size)) - 1])

    rank = expected + margin(sample >= of_rank(expected))
    low = of_rank(rank)
    ties = int((descending == low).sum()) > min(max(np.ceil(rank), 1), size) // 4 + inputs.LINE
    return low + ties, ties


def outcome(
    name: str, n: int, trials: int, margin: Callable[[npt.NDArray[np.bool_]], float], hashed: bool = True
) -> Outcome:
    grad, err = inputs.make(name, n)
    keys = ((grad + err).view(torch.int32) & 0x7FFFFFFF).numpy()
    ascending, k, result = np.sort(keys), inputs.count_of(n), Outcome()
    lines = len(inputs.sampled(n, 0))
    apart = n // inputs.LINE // lines * inputs.LINE
    for trial in range(trials):
        if hashed:
            places = inputs.sampled(n, trial).numpy()
        else:  # the same number of lines, one stride apart, from a start of their own
            first = np.arange(lines) * apart + trial * inputs.LINE % apart
            places = np.minimum(first[:, None] + np.arange(inputs.LINE), n - 1)
        threshold, ties = guess(keys[places], n, k, margin)
        listed, reached = (n - int(np.searchsorted(ascending, key)) for key in (threshold, threshold - ties))
        result.short += reached < k
        # Two threads share the entries, and each has a list of its own; the worst is that one holds them all.
        result.overflowed += listed > 4 * k + 2**16
        result.listed += listed / k / trials
    return result


def main(
    n: Annotated[int, typer.Option(help="Elements.")] = 1_000_000,
    trials: Annotated[int, typer.Option(help="Samples of each input.")] = 2000,
) -> None:
    """Prints how many of the guesses fail, for each input of the suite, at a ratio of 1 %."""
    table = Table(title=f"n = {n:,}, ratio {inputs.DENSITY:.0%}: failures out of {trials} samples")
    table.add_column("input")
    for column in ("as it is", "list / k", "overflows", "independent entries", "even spacing"):
        table.add_column(column, justify="right")
    total = Outcome()
    for name in inputs.INPUTS:
        if name in SKIPPED:  # they are made to fail
            continue
        ours = outcome(name, n, trials, clustered)
        bold = outcome(name, n, trials, independent)
        even = outcome(name, n, trials, clustered, hashed=False)
        total.short += ours.short
        total.overflowed += ours.overflowed
        cells = (ours.short, f"{ours.listed:.2f}", ours.overflowed, bold.short, even.short)
        table.add_row(name, *map(str, cells))
    console = Console(width=110)
    console.print(table)
    console.print(f"in all: {total.short} too high, {total.overflowed} lists too long", highlight=False)


if __name__ == "__main__":
    typer.run(main)
