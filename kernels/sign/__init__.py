"""Sign: one bit an element and the chunk's mean magnitude.

Source: Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes" (ICML 2019), Algorithm 1 (EF-SIGNSGD), with one scale a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gck.errors import CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.values import make_plain
from gck.wire import Layout

__all__ = ["Sign", "check_chunk_size"]


@dataclass(frozen=True)
class Sign(KernelCompressor):
    """Sends the sign of each element (1 means >= 0) and the mean |acc| of each chunk.

    The mean is over the chunk's valid elements, summed as a halving tree (add the upper half to the
    lower half, repeat), so that every backend gets the same bytes.

    Attributes:
        chunk_size: elements a scale, a power of two in [32, 8192].
        decay, clip: of residuals, as they are read; see `gck.sign_ef_`.

    Raises:
        ArgumentError: an option is out of range.
        DtypeError: an option is of the wrong type.
    """

    chunk_size: int = 256
    decay: float = 1.0
    clip: float | None = None

    name: ClassVar[str] = "sign"
    package: ClassVar[str] = __name__
    decodes_anything: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_plain(self, ("chunk_size",), ("decay", "clip"))
        check_chunk_size("Sign", self.chunk_size)
        checks.check_residual("Sign", self.decay, self.clip)

    @property
    def shard_unit(self) -> int | None:
        return self.chunk_size

    def layout(self, numel: int) -> Layout:
        return Layout.of((torch.uint32, -(-numel // 32)), (torch.float32, -(-numel // self.chunk_size)))

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> Sign:
        """The compressor that decodes a payload with these fields; the option is chunk_size."""
        return cls(*options)

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        words, scales = fields
        if words.dtype != torch.uint32 or scales.dtype != torch.float32:
            raise DtypeError(
                f"{function}: payload must hold uint32 words and float32 scales, "
                f"got {words.dtype} and {scales.dtype}"
            )
        # A shard's body may be longer than the part of the vector that it covers.
        if words.numel() < -(-numel // 32) or scales.numel() < -(-numel // self.chunk_size):
            raise CorruptPayloadError(
                f"{function}: payload of {words.numel()} words and {scales.numel()} scales of "
                f"{self.chunk_size} elements does not fit {numel} elements"
            )


def check_chunk_size(function: str, chunk_size: int) -> None:
    """Raises unless chunk_size is a power of two in [32, 8192]."""
    checks.check_power_of_two(function, "chunk_size", chunk_size, 32, 8192)
