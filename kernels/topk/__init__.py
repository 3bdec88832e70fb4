"""Top-k: the k entries of largest magnitude, with the rest kept as the residual.

Source: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent" (EMNLP 2017);
Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import NoneType
from typing import ClassVar

import torch
from torch import Tensor

from gck.coded_layout import INDEX_CODECS, RUN, index_fields
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor, backend
from gck.kernels.index_codecs import check_index_codec
from gck.kernels.quantize import Quantize
from gck.payload import CodedSparse, SparseGrad
from gck.values import make_plain, shown
from gck.wire import Layout

__all__ = ["VALUE_DTYPES", "TopK", "resolve_k"]

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUE_BITS = (32, 16, 8, 4)


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
        index_codec: how indices travel: "int32", "block16" or "elias_fano"; see docs/index_codecs.md.
        value_bits: 8 or 4: values travel as codes of `gck.Quantize`, with one scale for each 512 of them in
            order of index. 32 and 16 are short for value_dtype float32 and bfloat16 (or float16, if that is
            given), and are kept as that: value_bits is then None.

    Raises:
        ArgumentError: an option is out of range; ratio and k are both given, or neither; value_bits
            contradicts value_dtype.
        DtypeError: value_dtype is none of float32, bfloat16, float16; an option is of the wrong type.
    """

    ratio: float | None = None
    k: int | None = None
    value_dtype: torch.dtype = torch.float32
    decay: float = 1.0
    clip: float | None = None
    index_codec: str = "int32"
    value_bits: int | None = None

    name: ClassVar[str] = "topk"
    package: ClassVar[str] = __name__

    def __post_init__(self) -> None:
        make_plain(self, ("k", "value_bits"), ("ratio", "decay", "clip"))
        check_options("TopK", self.ratio, self.k, self.value_dtype)
        checks.check_residual("TopK", self.decay, self.clip)
        check_index_codec("TopK", self.index_codec)
        dtype, bits = _value_format("TopK", self.value_dtype, self.value_bits)
        # One way of saying it, so that compressors that do the same are equal.
        object.__setattr__(self, "value_dtype", dtype)
        object.__setattr__(self, "value_bits", bits)

    @property
    def previews(self) -> bool:
        """See `gck.compressor.previews`. Residuals with options are read in a pass that writes them."""
        return self.decay == 1 and self.clip is None

    def preview_(self, grad: Tensor, err: Tensor | None, bodies: Tensor) -> bool:
        """See `gck.compressor.preview_`. On the CPU, where a sample is a good guess at the threshold.

        Args and errors as of `gck.compressor.Compressor.compress_`.
        """
        function = "TopK.preview_"
        if err is None or not self.previews:
            return False
        self.check_inputs(function, grad, err)
        self.check_fits(function, grad, bodies)
        kernels = backend(function, self.package, grad.device)
        if not grad.numel() or not hasattr(kernels, "preview_"):
            return False
        done: bool = kernels.preview_(self, grad.view(-1), err.view(-1), bodies)
        return done

    @property
    def is_plain(self) -> bool:
        """Whether values and indices travel as numbers of torch's, which kernels write and read at once."""
        return self.index_codec == "int32" and self.value_bits is None

    @property
    def plain(self) -> TopK:
        """The compressor that selects the same entries, and sends them as numbers."""
        return replace(self, index_codec="int32", value_bits=None)

    @property
    def codes(self) -> Quantize | None:
        """What makes codes of the values selected; None where they travel as numbers."""
        return None if self.value_bits is None else Quantize(self.value_bits, RUN)

    @property
    def shard_unit(self) -> int | None:
        return None

    def layout(self, numel: int) -> Layout:
        # Tracing may bring symbolic sizes, which have no hash, and looks through caches anyway.
        if type(numel) is int and type(self.k) in (int, NoneType) and not torch.compiler.is_compiling():
            return _layout(numel, self.ratio, self.k, self.value_dtype, self.index_codec, self.value_bits)
        return _layout.__wrapped__(
            numel, self.ratio, self.k, self.value_dtype, self.index_codec, self.value_bits
        )

    def entries(self, numel: int) -> int:
        """See `gck.compressor.entries_of`."""
        return resolve_k("TopK", numel, self.ratio, self.k)

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> TopK:
        """The compressor that decodes a payload with these fields; options: none of plain ones, else k,
        value_bits or 0, and the index of the codec in INDEX_CODECS."""
        if not options:
            return cls(k=max(1, fields[0].numel()))
        k, value_bits, codec = options
        dtype = torch.float32 if value_bits else fields[0].dtype
        return cls(
            k=max(1, k), value_dtype=dtype, index_codec=INDEX_CODECS[codec], value_bits=value_bits or None
        )

    def payload(self, body: Tensor, numel: int) -> SparseGrad | CodedSparse:
        """The payload whose tensors are views of `body`, (layout(numel).nbytes,) uint8.

        Raises:
            CorruptPayloadError: the body has another size.
        """
        fields = self.layout(numel).views(body)
        if self.is_plain:
            return SparseGrad(fields[0], fields[1], numel)
        k = resolve_k("TopK", numel, self.ratio, self.k)
        values, scales, low, high = fields
        return CodedSparse(values, scales, low, high, numel, k, self.index_codec, self.value_bits or 0)

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        if not self.is_plain:
            # What codecs make of indices depends on the number of elements: nothing else will do.
            wanted = [(field.dtype, field.count) for field in self.layout(numel).fields]
            held = [(field.dtype, field.numel()) for field in fields]
            if held != wanted:
                raise CorruptPayloadError(
                    f"{function}: payload of {self} from {numel} elements must hold {wanted}, got {held}"
                )
            return
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
def _layout(
    numel: int,
    ratio: float | None,
    k: int | None,
    value_dtype: torch.dtype,
    index_codec: str,
    value_bits: int | None,
) -> Layout:
    count = resolve_k("TopK", numel, ratio, k)
    indices = index_fields(index_codec, numel, count)
    if index_codec == "int32" and value_bits is None:
        return Layout.of((value_dtype, count), indices[0])
    if value_bits is None:
        return Layout.of((value_dtype, count), (torch.float32, 0), *indices)
    codes = (torch.uint8, -(-count * value_bits // 8)), (torch.float32, -(-count // RUN))
    return Layout.of(*codes, *indices)


def _value_format(
    function: str, value_dtype: torch.dtype, value_bits: object
) -> tuple[torch.dtype, int | None]:
    """(dtype of the values that travel or are coded, bits of the codes or None)."""
    if value_bits is None:
        return value_dtype, None
    if isinstance(value_bits, bool) or not isinstance(value_bits, int):
        raise DtypeError(f"{function}: value_bits must be an int or None, got {shown(value_bits)}")
    if value_bits not in VALUE_BITS:
        raise ArgumentError(f"{function}: value_bits must be one of 32, 16, 8, 4, got {value_bits}")
    if value_bits == 16:
        return torch.bfloat16 if value_dtype == torch.float32 else value_dtype, None
    if value_dtype != torch.float32:
        raise ArgumentError(f"{function}: value_bits {value_bits} does not go with value_dtype {value_dtype}")
    return value_dtype, None if value_bits == 32 else value_bits


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
            raise DtypeError(f"{function}: k must be an int, got {shown(k)}")
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
