"""What the user says of a training: its gradient, its world, its link and its backward pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from gck.cli.links import parse_rate
from gck.collectives import Link
from gck.errors import ArgumentError

__all__ = ["MOST_RANKS", "Settings", "parse_numel"]

MOST_RANKS = 1024
DEVICES = ("cpu", "cuda", "none")
MOST_NUMEL = 10**13
_NUMEL = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,20})?(?:e[0-9]{1,2})?)([kMGB]?)")
_RATE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([kMGkmg]?)(?:bits?|b)(?:ps|/s)?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True)
class Settings:
    """One question.

    Attributes:
        numel: elements of the gradient.
        world_size: ranks, or nodes behind one link each.
        bits_per_second: of a link, in each direction, with the headers of packets.
        latency: seconds that a message takes beside its bytes.
        backward: seconds of a step in which the link could be busy; None: not known.
        device: where gradients are, "cpu" or "cuda"; "none": elsewhere, so that computing is left out.
    """

    numel: int
    world_size: int
    bits_per_second: int
    latency: float
    backward: float | None
    device: str

    @classmethod
    def parse(
        cls, numel: str, world_size: int, rate: str, latency_ms: float, backward_ms: float | None, device: str
    ) -> Settings:
        """From the words of a command line.

        Raises:
            ArgumentError: one of them is not as it must be.
        """
        if not 2 <= world_size <= MOST_RANKS:
            raise ArgumentError(f"--world-size must be in [2, {MOST_RANKS}], got {world_size}")
        for name, value in (("--latency-ms", latency_ms), ("--backward-ms", backward_ms)):
            if value is not None and not 0 <= value < float("inf"):
                raise ArgumentError(f"{name} must be at least 0 and finite, got {value}")
        if device not in DEVICES:
            raise ArgumentError(f"--device must be one of {', '.join(DEVICES)}, got {device!r}")
        backward = None if backward_ms is None else backward_ms / 1e3
        bits = _bits_per_second(rate)
        return cls(parse_numel(numel), world_size, bits, latency_ms / 1e3, backward, device)

    def link(self, bits_per_second: float | None = None) -> Link:
        """The link; or one of another rate."""
        return Link.ethernet(bits_per_second or self.bits_per_second, self.latency)


def parse_numel(text: str) -> int:
    """Elements, of "124439808", "124M", "7B" or "25e6" (powers of ten).

    Raises:
        ArgumentError: not a whole number from 1 to 10^13, written so.
    """
    match = _NUMEL.fullmatch(text.strip())
    numel = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal(0)
    if not 1 <= numel <= MOST_NUMEL or numel != int(numel):
        raise ArgumentError(f"--numel must be like 124439808, 124M, 7B or 25e6, got {text!r}")
    return int(numel)


def _bits_per_second(text: str) -> int:
    """Of "100mbit", "1gbps", "2.5 Gbit/s"; not of bytes, which are written with B.

    Raises:
        ArgumentError: not written so.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ArgumentError(f"--rate must be bits a second, like 100mbit, 1gbit or 2.5gbps, got {text!r}")
    return parse_rate(f"{match[1]}{match[2].lower()}bit")
