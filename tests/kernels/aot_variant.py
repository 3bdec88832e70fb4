"""What there is to compile ahead of time: one specialisation of a kernel."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

# Of kernels that read a residual: what they are given of its options.
RESIDUAL_TYPES = {"p_sums": "*fp64", "decay": "fp32", "p_clip": "*fp32"}


def residual_constants(options: str) -> dict[str, Any]:
    """Compile-time values for what a label says of them."""
    return {
        "RESIDUAL": -1 if "no residual" in options else 2 if "clip" in options else int("decay" in options),
        "STATS": "stats" in options,
    }


class Variant(NamedTuple):
    """Types of a kernel's arguments by name, and its compile-time values.

    Attributes:
        compressor: whose kernel it is.
        module: where the kernel is, below `gck.kernels`, or in full where it is no kernel of the package.
        elements: elements a thread moves, in kernels that are counted by element; else 0.
        most_registers: what the launch keeps a thread to, on NVIDIA's.
        together: whether programs wait for each other.
        unaligned: arguments that lie at any address of their elements; others at multiples of 16 bytes.
    """

    compressor: str
    module: str
    kernel: str
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    elements: int = 0
    most_registers: int | None = None
    together: bool = False
    unaligned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.compressor}.{self.kernel}[{self.label}]"

    def function(self) -> Any:
        module = self.module if "." in self.module else f"gck.kernels.{self.compressor}.{self.module}"
        return getattr(import_module(module), self.kernel)
