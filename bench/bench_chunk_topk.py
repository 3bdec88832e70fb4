"""gck.chunk_topk_ef_, 64 of 4096, against torch: the same function for exact and bf16 values, and the
selection alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gck
from bench import peers
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan

CHUNK_SIZE, K = 4096, 64
VALUE_BITS = (32, 16, 8, 4, 2)
# torch has no packed codes: with fewer bits a composition would be of our own making.
DTYPES = {32: torch.float32, 16: torch.bfloat16}


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for bits in plan.settings(VALUE_BITS, typical=16):
                make = partial(Case, "chunk_topk_ef_", "value_bits", bits, n, dtype)
                made.append(make(GCK, partial(_gck, bits)))
                if bits in DTYPES:
                    verify = partial(peers.verify_chunk_topk, chunk_size=CHUNK_SIZE, k=K, value_bits=bits)
                    made.append(make("torch composition", partial(_composition, bits), verify))
                if dtype == torch.float32:  # its input is fp32 in any case
                    verify = partial(peers.verify_torch_chunk_topk, chunk_size=CHUNK_SIZE, k=K)
                    made.append(make("torch.topk alone", _selection, verify))
    return made


def _gck(bits: int, buffers: Buffers) -> Any:
    return gck.chunk_topk_ef_(buffers.grad, buffers.err, CHUNK_SIZE, K, value_bits=bits)


def _composition(bits: int, buffers: Buffers) -> Any:
    return peers.torch_chunk_topk_ef_(buffers, CHUNK_SIZE, K, DTYPES[bits])


def _selection(buffers: Buffers) -> Any:
    return peers.torch_chunk_topk(buffers.pool.magnitude, CHUNK_SIZE, K)


def test_chunk_topk_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
