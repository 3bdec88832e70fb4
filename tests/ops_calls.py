"""What the tests of the functional API have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import gck
from tests.cases import make

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "topk_ef_": lambda g, e: gck.topk_ef_(g, e, 0.01),
    "sign_ef_": lambda g, e: gck.sign_ef_(g, e, 64),
    "chunk_topk_ef_": lambda g, e: gck.chunk_topk_ef_(g, e, 64, 4, value_bits=2),
    "quantize_ef_": lambda g, e: gck.quantize_ef_(g, e, 4, 64, "stochastic", 5),
    "random_k_ef_": lambda g, e: gck.random_k_ef_(g, e, 0.01, seed=5),
    "low_rank_ef_": lambda g, e: gck.low_rank_ef_(g, e, 3, seed=5),
}


def pair(n: int = 1000, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return make("gaussian", n, dtype)
