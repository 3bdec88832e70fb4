"""Top-k: the k entries of largest magnitude, with the rest kept as the residual.

Source: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (EMNLP 2017);
Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import ClassVar

import torch
from torch import Tensor

from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.payload import index_dtype
from gck.wire import Layout

__all__ = ["VALUE_DTYPES", "TopK", "resolve_k"]

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TopK(KernelCompressor):
    """Keeps exactly k entries.

    Order is by magnitude with NaN > Inf > finite; the lowest index wins a tie; indices ascend.
    Exactly one of ratio and k is given.

    Attributes:
        ratio: k = max(1, ceil(ratio * numel)) in double precision; in (0, 1].
        k: entries kept, in [1, numel].
        value_dtype: dtype of the values that travel; their rounding error stays in the residual.
        decay, clip: of residuals, as they are read; see `gck.topk_ef_`.

    Raises:
        ArgumentError: an option is out of range; ratio and k are both given, or neither.
        DtypeError: value_dtype is none of float32, bfloat16, float16; an option is of the wrong type.
    """

    ratio: float | None = None
    k: int | None = None
    value_dtype: torch.dtype = torch.float32
    decay: float = 1.0
    clip: float | None = None

    name: ClassVar[str] = "topk"
    package: ClassVar[str] = __name__

    def __post_init__(self) -> None:
        check_options("TopK", self.ratio, self.k, self.value_dtype)
        checks.check_residual("TopK", self.decay, self.clip)

    @property
    def shard_unit(self) -> int | None:
        return None

    def layout(self, numel: int) -> Layout:
        # Tracing may bring symbolic sizes, which have no hash, and looks through caches anyway.
        if type(numel) is int and type(self.k) in (int, NoneType) and not torch.compiler.is_compiling():
            return _layout(numel, self.ratio, self.k, self.value_dtype)
        return _layout.__wrapped__(numel, self.ratio, self.k, self.value_dtype)

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> TopK:
        """The compressor that decodes a payload with these fields; it has no options."""
        return cls(k=max(1, fields[0].numel()))

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        values, indices = fields
        if values.dtype not in VALUE_DTYPES or indices.dtype not in (torch.int32, torch.int64):
            raise DtypeError(
                f"{function}: payload must hold float32, bfloat16 or float16 values and int32 or int64 "
                f"indices, got {values.dtype} and {indices.dtype}"
            )
        if values.dim() != 1 or values.shape != indices.shape or values.numel() > numel:
            raise CorruptPayloadError(
                f"{function}: payload of {tuple(values.shape)} values and {tuple(indices.shape)} indices "
                f"does not fit {numel} elements"
            )


@lru_cache(maxsize=1024)
def _layout(numel: int, ratio: float | None, k: int | None, value_dtype: torch.dtype) -> Layout:
    count = resolve_k("TopK", numel, ratio, k)
    return Layout.of((value_dtype, count), (index_dtype(numel), count))


def check_options(
    function: str, ratio: float | None, k: int | None, value_dtype: torch.dtype = torch.float32
) -> None:
    """Raises unless exactly one of ratio and k is given and in range."""
    if (ratio is None) == (k is None):
        raise ArgumentError(f"{function}: exactly one of ratio and k must be given, got {ratio=} and {k=}")
    if ratio is not None:
        checks.check_ratio(function, ratio)
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
            raise DtypeError(f"{function}: k must be an int, got {type(k).__name__}")
        if k < 1:
            raise ArgumentError(f"{function}: k must be at least 1, got {k}")
    if value_dtype not in VALUE_DTYPES:
        raise DtypeError(f"{function}: value_dtype must be float32, bfloat16 or float16, got {value_dtype}")


def resolve_k(function: str, numel: int, ratio: float | None, k: int | None) -> int:
    """How many of `numel` entries are kept: 0 for an empty vector, else k or max(1, ceil(ratio * numel)).

    Raises:
        ArgumentError: k > numel > 0.
    """
    if numel == 0:
        return 0
    if ratio is not None:
        return max(1, min(numel, math.ceil(ratio * numel)))
    if k is None or k > numel:
        raise ArgumentError(f"{function}: k must be at most the number of elements {numel}, got {k}")
    return k
