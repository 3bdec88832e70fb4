"""What each compressor sends and takes: `gck.collectives.cost`, with the time to compute measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from gck.cli.plan.compressors import parse
from gck.cli.plan.settings import Settings
from gck.collectives import Cost, Link, all_reduce_cost, measure_compute
from gck.collectives.pieces import count_pieces
from gck.compressor import Compressor

__all__ = ["DENSE", "HALF", "Estimate", "Plan", "estimate", "make_plan"]

DENSE, HALF = "dense fp32", "dense 16 bits"
MEASURED = 25_000_000  # elements, at most; more take as much longer
GATHERED = 1 << 29  # bytes, at most, of the payloads of all ranks while measuring
SEARCHED = [10 ** (13 - step / 20) for step in range(201)]  # rates, from 10 Tbit/s to 1 kbit/s
SAMPLE = 1 << 20  # elements of the Gaussian gradient of which `left` is the share


@dataclass(frozen=True)
class Estimate:
    """One row.

    Attributes:
        name: as the user writes the compressor.
        bits: of a payload, an element of the gradient.
        left: the share of a Gaussian gradient's squares that the residual has after one step.
        cost: of one all-reduce of the whole gradient.
        compute: seconds to compress, reduce and decode, that a rank took here.
        pieces: that gck sends it in on such a link.
        seconds: of the all-reduce.
        compressor: None for dense ones.
    """

    name: str
    bits: float
    left: float
    cost: Cost
    compute: float
    pieces: int
    seconds: float
    compressor: Compressor | None

    def seconds_over(self, link: Link, settings: Settings) -> float:
        """Of an all-reduce over another link."""
        return self.cost.seconds(link, self.compute, _pieces(self.compressor, self.cost, settings, link))


@dataclass(frozen=True)
class Plan:
    """All rows of a question: dense ones first, then the compressors as they were given."""

    settings: Settings
    dense: Estimate
    half: Estimate
    compressed: list[Estimate]

    @property
    def rows(self) -> list[Estimate]:
        return [self.dense, self.half, *self.compressed]

    def step(self, row: Estimate) -> float:
        """Seconds of a step, at best: links are busy while the backward pass goes on, but the processors that
        compress are those that it runs on. Of the all-reduce alone where no backward pass is known."""
        backward = self.settings.backward
        return row.seconds if backward is None else max(row.seconds, backward + row.compute)

    def speed_up(self, row: Estimate) -> float:
        """The step with dense fp32 over that with this."""
        return self.step(self.dense) / self.step(row)

    def frontier(self) -> list[Estimate]:
        """Compressors than which none is both faster and leaves less, the mildest first; each is faster than
        dense gradients of 16 bits."""
        found: list[Estimate] = []
        for row in sorted(self.compressed, key=lambda row: (row.left, self.step(row))):
            if self.step(row) < min(map(self.step, (self.half, *found))):
                found.append(row)
        return found

    def pays_below(self, row: Estimate) -> float | None:
        """Bits a second of the fastest link on which an all-reduce with this is no slower than with 16 bits.

        None: on no link; infinite: on the fastest that is looked at, 10 Tbit/s, too.
        """

        def pays(rate: float) -> bool:
            link = self.settings.link(rate)
            return row.seconds_over(link, self.settings) <= self.half.cost.seconds(link)

        # In pieces the time does not always fall with the rate: from above, the first on which it pays.
        first = next((i for i, rate in enumerate(SEARCHED) if pays(rate)), None)
        if first is None or first == 0:
            return None if first is None else float("inf")
        low, high = SEARCHED[first], SEARCHED[first - 1]
        while high > 1.001 * low:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if pays(middle) else (low, middle)
        return low


def make_plan(settings: Settings, names: Sequence[str], done: Callable[[], object] = lambda: None) -> Plan:
    """Measures every compressor, for seconds; `done` is called after each.

    Raises:
        ArgumentError: a name is no compressor's, before anything is measured.
        Those of `gck.all_reduce_` on the device.
    """
    compressors = [(name, parse(name)) for name in names]
    for _, compressor in compressors:
        compressor.layout(settings.numel)  # for what it raises
    ring = all_reduce_cost(compressors[0][1], [settings.numel], settings.world_size, "dense")
    halved = Cost(ring.algorithm, ring.nbytes // 2, ring.messages, ring.rounds)
    rows = []
    for name, compressor in compressors:
        compute = _compute(compressor, settings)
        rows.append(estimate(name, compressor, settings, compute, _left(compressor, settings.numel)))
        done()
    return Plan(settings, _dense(DENSE, 32, ring, settings), _dense(HALF, 16, halved, settings), rows)


def estimate(name: str, compressor: Compressor, settings: Settings, compute: float, left: float) -> Estimate:
    """A row, of what was measured."""
    numel, link = settings.numel, settings.link()
    cost = all_reduce_cost(compressor, [numel], settings.world_size)
    pieces = _pieces(compressor, cost, settings, link)
    bits = 8 * compressor.layout(numel).nbytes / numel
    left = 0.0 if cost.algorithm == "dense" else left
    return Estimate(name, bits, left, cost, compute, pieces, cost.seconds(link, compute, pieces), compressor)


def _dense(name: str, bits: float, cost: Cost, settings: Settings) -> Estimate:
    return Estimate(name, bits, 0.0, cost, 0.0, 1, cost.seconds(settings.link()), None)


def _pieces(compressor: Compressor | None, cost: Cost, settings: Settings, link: Link) -> int:
    if compressor is None:
        return 1
    size = settings.numel, settings.world_size
    return count_pieces(compressor, *size, link, cost.algorithm, settings.device)


def _compute(compressor: Compressor, settings: Settings) -> float:
    """Seconds for the whole gradient, of one that is as long, or shorter."""
    numel, world_size = min(settings.numel, MEASURED), settings.world_size
    cost = all_reduce_cost(compressor, [settings.numel], world_size)
    if cost.algorithm == "dense" or settings.device == "none":
        return 0.0
    if cost.algorithm == "one_phase":
        payloads = world_size * compressor.layout(settings.numel).nbytes * numel // settings.numel
        numel = max(1, numel * min(payloads, GATHERED) // payloads)
    shorter = _of(compressor, numel, settings.numel)
    taken = measure_compute(shorter, numel, world_size, cost.algorithm, repeats=3, device=settings.device)
    return taken * settings.numel / numel


def _left(compressor: Compressor, numel: int) -> float:
    grad = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1), device="cpu")
    err = torch.zeros_like(grad)
    compressor = _of(compressor, SAMPLE, numel)
    body = torch.zeros(1, compressor.layout(SAMPLE).nbytes, dtype=torch.uint8)
    compressor.compress_(grad, err, body)
    return float(err.square().sum() / grad.square().sum())


def _of(compressor: Any, numel: int, whole: int) -> Compressor:
    """One that keeps as large a share of `numel` elements as `compressor` does of `whole`."""
    if compressor.shard_unit is None and isinstance(k := getattr(compressor, "k", None), int):
        compressor = dataclasses.replace(compressor, k=max(1, min(numel, round(k * numel / whole))))
    return cast("Compressor", compressor)
