"""gck.quantize_ef_ against torch: the same codes and scales, where torch has the operations for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gck
from bench import peers_quantize
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan

CHUNK_SIZE = 256
# What is measured, by name: arguments of quantize_ef_. A composition with random numbers of torch's would
# round by others, and one with two levels sum in another order: neither would be the same function.
SETTINGS: dict[str, dict[str, Any]] = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "2": {"bits": 2},
    "2, mean": {"bits": 2, "scale": "mean"},
    "8, stochastic": {"bits": 8, "rounding": "stochastic"},
    "4, stochastic": {"bits": 4, "rounding": "stochastic"},
}


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for name in plan.settings(tuple(SETTINGS), typical="4"):
                make = partial(Case, "quantize_ef_", "bits", name, n, dtype)
                made.append(make(GCK, partial(_gck, SETTINGS[name])))
                if list(SETTINGS[name]) == ["bits"]:
                    bits = SETTINGS[name]["bits"]
                    verify = partial(peers_quantize.verify_quantize, bits=bits, chunk_size=CHUNK_SIZE)
                    made.append(make("torch composition", partial(_composition, bits), verify))
    return made


def _gck(options: dict[str, Any], buffers: Buffers) -> Any:
    return gck.quantize_ef_(buffers.grad, buffers.err, chunk_size=CHUNK_SIZE, **options)


def _composition(bits: int, buffers: Buffers) -> Any:
    return peers_quantize.torch_quantize_ef_(buffers, bits, CHUNK_SIZE)


def test_quantize_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
