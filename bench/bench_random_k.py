"""gck.random_k_ef_ against torch: a permutation of all elements, and one entry a stratum.

Peers draw places of their own, by torch's generator: the same function, but for the draw.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gck
from bench import peers
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan
from gck.kernels.topk import resolve_k

RATIOS = (0.001, 0.01, 0.1)
COMPOSITIONS = {"torch randperm": peers.random_places, "torch, one a stratum": peers.places_of_strata}


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for ratio in plan.settings(RATIOS, typical=0.01):
                make = partial(Case, "random_k_ef_", "ratio", ratio, n, dtype)
                made.append(make(GCK, partial(_gck, ratio)))
                k = resolve_k("bench", n, ratio, None)
                made += [
                    make(name, partial(_composition, draw, k), partial(peers.verify_random_k, draw, k=k))
                    for name, draw in COMPOSITIONS.items()
                ]
    return made


def _gck(ratio: float, buffers: Buffers) -> Any:
    return gck.random_k_ef_(buffers.grad, buffers.err, ratio, seed=1)


def _composition(draw: peers.Draw, k: int, buffers: Buffers) -> Any:
    return peers.torch_random_k_ef_(buffers, draw, k)


def test_random_k_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
