"""gck.sign_ef_ against torch with numpy.packbits (on GPUs: torch alone)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gck
from bench import peers
from bench.suite import GCK, Case, Plan

CHUNK_SIZES = (64, 256, 1024, 4096)


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    name = "torch composition" if plan.device.type == "cuda" else "torch + packbits"
    made = []
    for n in plan.sizes:
        for dtype in plan.dtypes:
            for chunk_size in plan.settings(CHUNK_SIZES, typical=256):
                make = partial(Case, "sign_ef_", "chunk_size", chunk_size, n, dtype)
                made.append(make(GCK, lambda b, c=chunk_size: gck.sign_ef_(b.grad, b.err, c)))
                made.append(
                    make(
                        name,
                        lambda b, c=chunk_size: peers.sign_ef_peer_(b, c),
                        partial(peers.verify_sign, chunk_size=chunk_size),
                    )
                )
    return made


def test_sign_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
