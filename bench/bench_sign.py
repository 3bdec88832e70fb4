"""gck.sign_ef_ against torch with numpy.packbits (on GPUs: torch alone, and torch with cupy.packbits)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gck
from bench import peers
from bench.measure import Buffers
from bench.suite import GCK, Case, Plan

CHUNK_SIZES = (64, 256, 1024, 4096)


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    packs: dict[str, peers.Pack] = {"torch + packbits": peers.pack_with_numpy}
    if plan.device.type == "cuda":
        packs = {"torch composition": peers.pack_with_torch}
        if peers.have_cupy():
            packs["torch + cupy.packbits"] = peers.pack_with_cupy
    made = []
    for n in plan.sizes_and_huge:
        for dtype in plan.dtypes:
            for chunk_size in plan.settings(CHUNK_SIZES, typical=256, n=n):
                make = partial(Case, "sign_ef_", "chunk_size", chunk_size, n, dtype)
                made.append(make(GCK, partial(_gck, chunk_size)))
                for name, pack in packs.items():
                    verify = partial(peers.verify_sign, chunk_size=chunk_size, pack=pack)
                    made.append(make(name, partial(_peer, chunk_size, pack), verify))
    return made


def _gck(chunk_size: int, buffers: Buffers) -> Any:
    return gck.sign_ef_(buffers.grad, buffers.err, chunk_size)


def _peer(chunk_size: int, pack: peers.Pack, buffers: Buffers) -> Any:
    return peers.sign_ef_peer_(buffers, chunk_size, pack)


def test_sign_ef(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
