"""Inputs that kernels must survive, and how results are compared: by their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _random(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + n)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator) * 0.5


def _nonfinite(n: int) -> tuple[Tensor, Tensor]:
    grad, err = _random(n)
    grad[::7], grad[1::11], grad[2::13], err[3::17] = math.nan, math.inf, -math.inf, math.inf
    return grad, err


def _few_nonfinite(n: int) -> tuple[Tensor, Tensor]:
    grad, err = _random(n)
    grad[n // 2] = math.inf
    err[n // 3] = -math.nan
    return grad, err


def _ties(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-3, 4, (n,), generator=generator).float(), torch.full((n,), -0.0)


def _clustered(n: int) -> tuple[Tensor, Tensor]:
    grad, err = torch.zeros(n), torch.zeros(n)
    rows = slice(n // 3, n // 3 + max(1, n // 100))
    grad[rows] = _random(n)[0][rows]
    return grad, err


def _periodic(n: int) -> tuple[Tensor, Tensor]:
    grad, err = _random(n)
    grad[:: 64 * 16] *= 100
    return grad, err


def _outlier(n: int) -> tuple[Tensor, Tensor]:
    grad, err = _random(n)
    grad[n - 1] = 3e38
    return grad, err


CASES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "gaussian": _random,
    "ties": _ties,
    "all zero": lambda n: (torch.zeros(n), torch.zeros(n)),
    "minus zero": lambda n: (torch.full((n,), -0.0), torch.full((n,), -0.0)),
    "all equal": lambda n: (torch.ones(n), torch.zeros(n)),
    "nonfinite": _nonfinite,
    "few nonfinite": _few_nonfinite,
    "all nan": lambda n: (torch.full((n,), math.nan), torch.zeros(n)),
    "denormal": lambda n: tuple(x * 1e-41 for x in _random(n)),
    "huge": lambda n: tuple(x * 1e38 for x in _random(n)),
    "sorted": lambda n: (_random(n)[0].sort().values, torch.zeros(n)),
    "clustered": _clustered,
    "periodic": _periodic,
    "outlier": _outlier,
}


def make(case: str, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(grad of dtype, err fp32) of a case."""
    grad, err = CASES[case](n)
    return grad.to(dtype), err


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8)


def one_nan(x: Tensor) -> Tensor:
    """x with every NaN made the same: decoding may flip a NaN's sign bit."""
    return torch.where(x.isnan(), math.nan, x)


@dataclass
class Guarded:
    """A tensor between canaries, at an address that is aligned to its element only."""

    whole: Tensor
    inner: Tensor

    PAD = 37

    @classmethod
    def of(cls, x: Tensor) -> Guarded:
        whole = torch.full((x.numel() + 2 * cls.PAD,), 77, dtype=x.dtype, device=x.device)
        inner = whole[cls.PAD : cls.PAD + x.numel()]
        inner.copy_(x)
        return cls(whole, inner)

    def intact(self) -> bool:
        edges = torch.cat([self.whole[: self.PAD], self.whole[len(self.whole) - self.PAD :]])
        return bool((edges == 77).all())
