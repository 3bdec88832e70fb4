"""gck.quantize_ef_ against torch: the same codes and scales, but for what random rounding draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gck
from bench import peers_quantize
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan

CHUNK_SIZE = 256
# What is measured, by name: arguments of quantize_ef_.
SETTINGS: dict[str, dict[str, Any]] = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "2": {"bits": 2},
    "2, mean": {"bits": 2, "scale": "mean"},
    "8, stochastic": {"bits": 8, "rounding": "stochastic", "seed": 0},
    "4, stochastic": {"bits": 4, "rounding": "stochastic", "seed": 0},
}


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes_and_huge:
        for dtype in plan.dtypes:
            for name in plan.settings(tuple(SETTINGS), typical="4", n=n):
                make = partial(Case, "quantize_ef_", "bits", name, n, dtype)
                made.append(make(GCK, partial(_gck, SETTINGS[name])))
                made.append(composition(make, SETTINGS[name]))
                # Its input is fp32 in any case.
                if name == "8" and dtype == torch.float32 and peers_quantize.have_quantize_per_channel():
                    made.append(per_channel(make))
    return made


def composition(make: Callable[..., Case], options: dict[str, Any]) -> Case:
    """What one would write with torch for such a setting."""
    if "scale" in options:
        run = _of_means
        return make("torch composition", run, partial(peers_quantize.verify_means, chunk_size=CHUNK_SIZE))
    bits = options["bits"]
    of = {"bits": bits, "chunk_size": CHUNK_SIZE}
    if "rounding" in options:
        run = partial(_composition, bits, stochastic=True)
        return make("torch composition, torch.rand", run, partial(peers_quantize.verify_stochastic, **of))
    return make(
        "torch composition", partial(_composition, bits), partial(peers_quantize.verify_quantize, **of)
    )


def per_channel(make: Callable[..., Case]) -> Case:
    """Not the same function: codes of a sum made beforehand, and no residual."""
    return make(
        "torch.quantize_per_channel alone",
        peers_quantize.torch_quantize_per_channel,
        partial(peers_quantize.verify_quantize_per_channel, chunk_size=CHUNK_SIZE),
        partial(peers_quantize.acc_of, chunk_size=CHUNK_SIZE),
    )


def _gck(options: dict[str, Any], buffers: Buffers) -> Any:
    return gck.quantize_ef_(buffers.grad, buffers.err, chunk_size=CHUNK_SIZE, **options)


def _composition(bits: int, buffers: Buffers, *, stochastic: bool = False) -> Any:
    return peers_quantize.torch_quantize_ef_(buffers, bits, CHUNK_SIZE, stochastic=stochastic)


def _of_means(buffers: Buffers) -> Any:
    return peers_quantize.torch_means_ef_(buffers, CHUNK_SIZE)


def test_quantize_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
