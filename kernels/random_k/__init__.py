"""Random-k: k entries chosen by a seed that all ranks share, so that values alone travel.

Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018), Definition 2.1 and
Algorithm 1 (random-k with error feedback); Wangni, Wang, Liu and Zhang, "Gradient Sparsification for
Communication-Efficient Distributed Optimization" (NeurIPS 2018), section 3 (values divided by their
probability, which removes the bias); Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1,
2, 3" (SC 2011), section 3.3 (Philox). How indices are drawn: docs/kernels/random_k.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gck.compressor import check_seeded
from gck.errors import CorruptPayloadError, DtypeError
from gck.kernels.common import checks
from gck.kernels.common.base import KernelCompressor
from gck.kernels.topk import VALUE_DTYPES, check_options, resolve_k
from gck.values import make_plain
from gck.wire import Layout

__all__ = ["RandomK", "Unbiased"]

FP32 = struct.Struct("f")


@dataclass(frozen=True)
class RandomK(KernelCompressor):
    """Sends k entries, of which `seed`, the number of elements and k alone say where they are.

    The vector, as a ring turned by a random angle, is cut into k runs of equal length (to within one), and
    one entry of each is chosen: k different indices, each element equally likely. Values travel in the order
    of their indices. With error feedback they travel as they are; without (`compress_` with err None) each is
    multiplied by numel / k, so that the expectation of what is decoded is the gradient.

    All ranks must have the same seed in a step, and another one in the next, or the same entries would be
    sent for ever. The hooks of `gck.ddp` and `gck.fsdp`, and `gck.diloco`, see to that; any other loop makes
    the step's compressor from the last one:

        compressor = dataclasses.replace(compressor, seed=step)

    Exactly one of ratio and k is given.

    Attributes:
        ratio: k = max(1, ceil(ratio * numel)) in double precision; in (0, 1].
        k: entries sent, in [1, numel].
        seed: of the choice, in [-2**63, 2**63). No generator of torch is read or changed. None: they take the
            number of the step, and all else refuses to choose.
        value_dtype: dtype of the values that travel; their rounding error stays in the residual.
        decay, clip: of residuals, as they are read; see `gck.random_k_ef_`.

    Raises:
        ArgumentError: ratio, k or seed out of range, both or neither of ratio and k given.
        DtypeError: an option is of the wrong type.
    """

    ratio: float | None = None
    k: int | None = None
    seed: int | None = field(default=None, metadata={"of_a_step": True})
    value_dtype: torch.dtype = torch.float32
    decay: float = 1.0
    clip: float | None = None

    name: ClassVar[str] = "random_k"
    package: ClassVar[str] = __name__
    rescale: ClassVar[bool] = False  # values by numel / k

    def __post_init__(self) -> None:
        make_plain(self, ("k", "seed"), ("ratio", "decay", "clip"))
        check_options("RandomK", self.ratio, self.k, self.value_dtype)
        if self.seed is not None:
            checks.check_seed("RandomK", self.seed)
        checks.check_residual("RandomK", self.decay, self.clip)

    @property
    def shard_unit(self) -> int | None:
        return None

    @property
    def summed(self) -> RandomK:
        """See `gck.compressor.is_seeded`."""
        return self if self.value_dtype == torch.float32 else replace(self, value_dtype=torch.float32)

    @property
    def unseeded(self) -> bool:
        """See `gck.compressor.check_seeded`."""
        return self.seed is None

    def for_step(self, step: int, rank: int) -> RandomK:
        """See `gck.compressor.compressor_of_step`: the same entries on all ranks."""
        return self if self.seed is not None else replace(self, seed=step)

    def layout(self, numel: int) -> Layout:
        return Layout.of((self.value_dtype, resolve_k("RandomK", numel, self.ratio, self.k)))

    def entries(self, numel: int) -> int:
        """See `gck.compressor.entries_of`."""
        return resolve_k("RandomK", numel, self.ratio, self.k)

    def factor(self, numel: int) -> float:
        """What each value is multiplied by: numel / k, in double precision and then in fp32, or 1."""
        if not self.rescale:
            return 1.0
        factor: float = FP32.unpack(FP32.pack(numel / self.layout(numel).fields[0].count))[0]
        return factor

    @classmethod
    def for_fields(cls, fields: tuple[Tensor, ...], options: tuple[int, ...]) -> RandomK:
        """The compressor that decodes a payload with these fields; options: seed."""
        return cls(k=max(1, fields[0].numel()), seed=options[0])

    def run(
        self,
        function: str,
        grad: Tensor,
        err: Tensor | None,
        bodies: Tensor,
        nonfinite: Tensor | None,
        clip: Tensor | None = None,
        **options: Tensor | None,
    ) -> None:
        """See `KernelCompressor.run`. Without a residual the message is unbiased."""
        compressor = self if err is not None else Unbiased(self.ratio, self.k, self.seed, self.value_dtype)
        KernelCompressor.run(compressor, function, grad, err, bodies, nonfinite, clip, **options)

    def check_fields(self, function: str, numel: int, fields: tuple[Tensor, ...]) -> None:
        check_seeded(function, self)
        (values,) = fields
        if values.dtype not in VALUE_DTYPES:
            raise DtypeError(
                f"{function}: payload must hold float32, bfloat16 or float16 values, got {values.dtype}"
            )
        if values.dim() != 1 or not min(numel, 1) <= values.numel() <= numel:
            raise CorruptPayloadError(
                f"{function}: payload of {tuple(values.shape)} values does not fit {numel} elements"
            )


class Unbiased(RandomK):
    """What `RandomK` is without a residual. Never with one: the residual would be fed back, multiplied."""

    rescale: ClassVar[bool] = True
