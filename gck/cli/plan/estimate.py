"""What each compressor sends and takes: `gck.collectives.cost`, with the time to compute measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    def pays_below(self, dense: Cost, latency: float) -> float | None:
        """Bits a second of the fastest link on which this, in one piece, is no slower than dense fp32.

        Bytes that are saved, over the seconds that computing takes more than is saved in rounds; None: on no
        link, for it sends no fewer bytes; infinite: on every one.
        """
        saved = dense.nbytes - self.cost.nbytes
        more = self.compute - (dense.rounds - self.cost.rounds) * latency
        if saved <= 0:
            return None if more >= 0 else float("inf")
        return saved / more / Link.ethernet(1.0).bandwidth if more > 0 else float("inf")


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
        """Seconds of a step, at best: what a backward pass can't hide of the all-reduce comes on top."""
        return max(row.seconds, self.settings.backward or 0.0)

    def speed_up(self, row: Estimate) -> float:
        """Steps of dense fp32 over those with this; of all-reduces alone where no backward pass is known."""
        return self.step(self.dense) / self.step(row)


def make_plan(settings: Settings, names: Sequence[str], done: Callable[[str], None] = lambda _: None) -> Plan:
    """Measures every compressor, for seconds; `done` is called with the name of each.

    Raises:
        ArgumentError: a name is no compressor's, before anything is measured.
        Those of `gck.all_reduce_` on the device.
    """
    compressors = [(name, parse(name)) for name in names]
    ring = all_reduce_cost(compressors[0][1], [settings.numel], settings.world_size, "dense")
    halved = Cost(ring.algorithm, ring.nbytes // 2, ring.messages, ring.rounds)
    rows = []
    for name, compressor in compressors:
        compute = _compute(compressor, settings)
        rows.append(estimate(name, compressor, settings, compute, _left(compressor)))
        done(name)
    return Plan(settings, _dense(DENSE, 32, ring, settings), _dense(HALF, 16, halved, settings), rows)


def estimate(name: str, compressor: Compressor, settings: Settings, compute: float, left: float) -> Estimate:
    """A row, of what was measured."""
    numel, link = settings.numel, settings.link()
    cost = all_reduce_cost(compressor, [numel], settings.world_size)
    pieces = _pieces(compressor, cost, settings, link)
    bits = 8 * compressor.layout(numel).nbytes / numel
    return Estimate(name, bits, left, cost, compute, pieces, cost.seconds(link, compute, pieces), compressor)


def _dense(name: str, bits: float, cost: Cost, settings: Settings) -> Estimate:
    return Estimate(name, bits, 0.0, cost, 0.0, 1, cost.seconds(settings.link()), None)


def _pieces(compressor: Compressor | None, cost: Cost, settings: Settings, link: Link) -> int:
    if compressor is None or settings.device != "cpu":
        return 1
    return count_pieces(compressor, settings.numel, settings.world_size, link, cost.algorithm)


def _compute(compressor: Compressor, settings: Settings) -> float:
    """Seconds for the whole gradient, of one that is as long, or shorter."""
    numel, world_size = min(settings.numel, MEASURED), settings.world_size
    cost = all_reduce_cost(compressor, [settings.numel], world_size)
    if cost.algorithm == "dense":
        return 0.0
    if cost.algorithm == "one_phase":
        payloads = world_size * compressor.layout(numel).nbytes
        numel = max(1, numel * min(payloads, GATHERED) // payloads)
    taken = measure_compute(compressor, numel, world_size, cost.algorithm, repeats=3, device=settings.device)
    return taken * settings.numel / numel


def _left(compressor: Compressor) -> float:
    grad = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(1), device="cpu")
    err = torch.zeros_like(grad)
    body = torch.zeros(1, compressor.layout(SAMPLE).nbytes, dtype=torch.uint8)
    compressor.compress_(grad, err, body)
    return float(err.square().sum() / grad.square().sum())
