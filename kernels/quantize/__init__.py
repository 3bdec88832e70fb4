"""Quantize: a code of 8, 4 or 2 bits an element, and the scale of each chunk.

Sources: Alistarh, Grubic, Li, Tomioka and Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding" (NeurIPS 2017), section 3 (stochastic rounding, buckets with a scale each);
Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), Algorithm 2 (any compressor with error
feedback); Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section
3.3 (Philox).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.values import make_plain, shown
from gck.wire import Layout

__all__ = ["BITS", "ROUNDINGS", "SCALES", "Quantize", "check_format", "check_options"]

BITS = (8, 4, 2)
ROUNDINGS = ("nearest", "stochastic")
SCALES = ("max", "mean")
# Of the residual of the second phase of a collective: never the bits that the first phase rounded by.
SERVER_KEY = 1 << 62
STEPS = 40  # bits of a step in the seed that is chosen for it


@dataclass(frozen=True)
class Quantize(KernelCompressor):
    """Sends each element as a multiple of its chunk's scale, in few bits.

    With stochastic rounding, `seed` should be another one at every step, and on every rank, so that errors
    average out. The hooks of `gck.ddp` and `gck.fsdp`, and `gck.diloco`, see to that; any other loop makes
    the step's compressor from the last one:

        compressor = dataclasses.replace(compressor, seed=step * world_size + rank)

    Attributes:
        bits: of a code: 8, 4 or 2.
        chunk_size: elements a scale, a power of two in [32, 8192].
        rounding: "nearest" (ties to even), or "stochastic": up or down at random, so that the expectation is
            the element. Element i of the vector rounds by a function of (seed, i) alone: the same on every
            device, for any number of threads or shards; no generator of torch is read or changed. With 2 bits
            it is for use without a residual, which grows to several gradients and may let training diverge.
        seed: of stochastic rounding, in [-2**63, 2**63). What travels is decoded without it: compressors
            that differ in their seed alone are equal, and ranks may differ in it. None: they choose one of
            the step and the rank, and all else refuses to round at random.
        scale: "max": codes are multiples of the chunk's largest magnitude / (2**(bits - 1) - 1). "mean", for
            2 bits and nearest rounding: a sign and one of two levels, the means of the magnitudes above and
            below the mean.
        decay, clip: of residuals, as they are read; see `gck.quantize_ef_`.
        first: index, in the vector, of the first element: of a part that is compressed by itself, which then
            rounds as it does in the whole. A multiple of chunk_size. Of no account to a receiver.

    Raises:
        ArgumentError: an option is out of range.
        DtypeError: an option is of the wrong type.
    """

    bits: int = 4
    chunk_size: int = 256
    rounding: str = "nearest"
    seed: int | None = field(default=None, compare=False)
    scale: str = "max"
    decay: float = 1.0
    clip: float | None = None
    first: int = field(default=0, compare=False, repr=False)

    name: ClassVar[str] = "quantize"
    package: ClassVar[str] = __name__
    decodes_anything: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_plain(self, ("bits", "chunk_size", "seed", "first"), ("decay", "clip"))
        check_options("Quantize", self.bits, self.chunk_size, self.rounding, self.seed, self.scale)
        checks.check_residual("Quantize", self.decay, self.clip)
        if isinstance(self.first, bool) or not isinstance(self.first, int):
            raise DtypeError(f"Quantize: first must be an int, got {shown(self.first)}")
        if not 0 <= self.first < 2**62 or self.first % self.chunk_size:
            raise ArgumentError(
                f"Quantize: first must be a multiple of chunk_size {self.chunk_size} in [0, 2**62), "
                f"got {self.first}"
            )

    @property
    def shard_unit(self) -> int | None:
        return self.chunk_size

    def server_for(self, world_size: int) -> Quantize:
        """The compressor of what has been summed: it rounds by random bits of its own."""
        return self if self.seed is None else replace(self, seed=self.seed ^ SERVER_KEY)

    @property
    def unseeded(self) -> bool:
        """See `gck.compressor.check_seeded`."""
        return self.seed is None and self.rounding == "stochastic"

    @property
    def key(self) -> int:
        """The seed, or any number where nothing is random."""
        return 0 if self.seed is None else self.seed

    def for_step(self, step: int, rank: int) -> Quantize:
        """See `gck.compressor.compressor_of_step`: other random bits on every rank."""
        return replace(self, seed=(rank << STEPS) + step) if self.unseeded else self

    @property
    def two_levels(self) -> bool:
        return self.scale == "mean"

    def at(self, start: int) -> Quantize:
        """See `gck.compressor.compressor_at`."""
        return self if self.rounding == "nearest" else replace(self, first=self.first + start)

    def layout(self, numel: int) -> Layout:
        chunks = -(-numel // self.chunk_size)
        return Layout.of(
            (torch.uint8, -(-numel * self.bits // 8)),
            (torch.float32, chunks * (2 if self.two_levels else 1)),
        )

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> Quantize:
        """The compressor that decodes a payload with these fields; options: bits, chunk_size, and the index
        of scale in SCALES."""
        bits, chunk_size, scale = options
        return cls(bits, chunk_size, scale=SCALES[scale])

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        codes, scales = fields
        if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
            raise DtypeError(
                f"{function}: payload must hold uint8 codes and float32 scales, "
                f"got {codes.dtype} and {scales.dtype}"
            )
        # A shard's body may be longer than the part of the vector that it covers.
        held = codes.numel(), scales.numel()
        if any(has < field.count for has, field in zip(held, self.layout(numel).fields, strict=True)):
            raise CorruptPayloadError(
                f"{function}: payload of {held[0]} bytes of {self.bits}-bit codes and {held[1]} scales of "
                f"{self.chunk_size} elements does not fit {numel} elements"
            )


def check_format(function: str, bits: object, chunk_size: object, scale: object) -> None:
    """Raises unless the options that a receiver needs are in range."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise DtypeError(f"{function}: bits must be an int, got {shown(bits)}")
    if bits not in BITS:
        raise ArgumentError(f"{function}: bits must be one of 8, 4, 2, got {bits}")
    checks.check_power_of_two(function, "chunk_size", chunk_size, 32, 8192)
    if scale not in SCALES:
        raise ArgumentError(f'{function}: scale must be "max" or "mean", got {scale!r}')
    if scale == "mean" and bits != 2:
        raise ArgumentError(f'{function}: scale "mean" needs 2 bits, got {bits}')


def check_options(
    function: str, bits: object, chunk_size: object, rounding: object, seed: object, scale: object
) -> None:
    """Raises unless the options of a `Quantize` are in range."""
    check_format(function, bits, chunk_size, scale)
    if rounding not in ROUNDINGS:
        raise ArgumentError(f'{function}: rounding must be "nearest" or "stochastic", got {rounding!r}')
    if rounding == "stochastic" and scale == "mean":
        raise ArgumentError(f'{function}: scale "mean" needs rounding "nearest", got "stochastic"')
    if seed is not None:
        checks.check_seed(function, seed)
