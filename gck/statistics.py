"""What a compressing call can say of what it compressed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gck.errors import ArgumentError, DtypeError
from gck.values import plain_int, shown

__all__ = ["FIELDS", "Statistics"]

FIELDS = ("acc_l1", "acc_sq", "err_sq", "nonfinite", "selected")


class Statistics(NamedTuple):
    """Five numbers of one call, on the device where it ran: nobody waits until one is read.

    A call that is given one as `stats=` overwrites it; all-reduces make one where `gck.ErrorFeedback.measure`
    says so. Every attribute below is a () float64 view of
    `values`. In the norms, what is not finite counts as 0. They are sums of 512 numbers, then of 512 of
    these, and so on, each added as a halving tree, so that every device and any number of threads gives the
    same bits.

    Attributes:
        values: (5,) float64: acc_l1, acc_sq, err_sq, nonfinite, selected.
        numel: elements of acc, where whoever took them said so, as all-reduces do.
    """

    values: Tensor
    numel: int | None = None

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> Statistics:
        """Zeros on `device`; default: torch's current one."""
        return cls(torch.zeros(len(FIELDS), dtype=torch.float64, device=device))

    @property
    def acc_l1(self) -> Tensor:
        """The sum of the magnitudes of acc, the gradient with its residual."""
        return self.values[0]

    @property
    def acc_sq(self) -> Tensor:
        """The sum of the squares of acc."""
        return self.values[1]

    @property
    def err_sq(self) -> Tensor:
        """The sum of the squares of the residual that the call left.

        Of `topk_ef_` it is acc_sq less what was sent of it, and so exact to within 2**-45
        acc_sq. An entry that became infinite in a narrow `value_dtype`, and left nothing, counts with what it
        was.
        """
        return self.values[2]

    @property
    def nonfinite(self) -> Tensor:
        """How many entries of acc are not finite."""
        return self.values[3]

    @property
    def selected(self) -> Tensor:
        """How many entries the payload has: k, those of all chunks, or all where each has a code."""
        return self.values[4]

    @property
    def left(self) -> Tensor:
        """err_sq / acc_sq, () float64: the share that is left for later; 0 where acc is 0, and of what was
        sent dense. The delta of a delta-compressor is 1 less that."""
        return torch.where(self.acc_sq > 0, self.err_sq / self.acc_sq, 0.0)

    def density(self, numel: int | None = None) -> Tensor:
        """acc_l1**2 / (numel * acc_sq), () float64 in [1 / numel, 1]; 0 where acc is 0.

        numel is that of acc, an int in [0, 2**63). Default: that of the statistics, where they have it.

        A sign compressor with one scale leaves (1 - density) of acc_sq. Source: Karimireddy et al., "Error
        Feedback Fixes SignSGD and other Gradient Compression Schemes" (ICML 2019), Lemma 8.
        """
        numel = plain_int(self.numel if numel is None else numel)
        if isinstance(numel, bool) or not isinstance(numel, (int, torch.SymInt)):
            raise DtypeError(f"Statistics.density: numel must be an int, got {shown(numel)}")
        if not 0 <= numel < 2**63:
            raise ArgumentError(f"Statistics.density: numel must be in [0, 2**63), got {shown(numel)}")
        # Not by name: torch.compile of torch 2.6 does not read properties of a named tuple.
        acc_l1, acc_sq = self.values[0], self.values[1]
        return torch.where(acc_sq > 0, acc_l1.square() / (acc_sq * numel), 0.0)
