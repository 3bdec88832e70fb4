"""Index codecs: encoding and decoding the ascending indices of a top-k, against the same in torch.

The floor of a codec is what must move: the indices, and the bytes that they become. Gigabytes of int32
indices a second are 4e-9 k / seconds, of all threads together: `OMP_NUM_THREADS=1` for those of a core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError
from bench.suite import GCK, Case, Plan
from gck.coded_layout import index_fields
from gck.kernels import index_codecs
from gck.kernels.index_codecs import reference
from gck.kernels.topk import resolve_k

RATIOS = (0.001, 0.01, 0.1)
CODECS = ("block16", "elias_fano")

Given = tuple[int, Tensor, tuple[Tensor, Tensor]]  # elements, indices, what they are encoded as


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for codec in CODECS:
        for ratio in plan.settings(RATIOS, typical=0.01):
            k = resolve_k("bench", n, ratio, None)
            coded = sum(dtype.itemsize * count for dtype, count in index_fields(codec, n, k))
            of = {"bytes": (4 * k + coded) / n, "prepare": partial(_prepare, codec, k)}
            for what, run, peer in (("encode", _encode, _torch_encode), ("decode", _decode, _torch_decode)):
                make = partial(Case, f"{what} {codec}", "ratio", ratio, n, torch.float32, **of)
                made.append(make(GCK, partial(run, codec)))
                # The oracle knows the CPU alone.
                if plan.device.type == "cpu":
                    verify = partial(_verify, partial(run, codec), partial(peer, codec), codec, k)
                    made.append(make("torch composition", partial(peer, codec), verify))
    return made


def _prepare(codec: str, k: int, buffers: Buffers) -> Given:
    pool = buffers.pool
    return pool.made((codec, k), lambda: _made(codec, k, pool))


def _made(codec: str, k: int, pool: Pool) -> Given:
    # One of each of k strata of equal length.
    generator = torch.Generator().manual_seed(k)
    places = torch.arange(k, dtype=torch.float64) + torch.rand(k, generator=generator, dtype=torch.float64)
    indices = (places * (pool.n / k)).to(torch.int32).to(pool.device)
    return pool.n, indices, index_codecs.encode(codec, indices, pool.n)


def _encode(codec: str, given: Given) -> tuple[Tensor, ...]:
    numel, indices, _ = given
    return index_codecs.encode(codec, indices, numel)


def _decode(codec: str, given: Given) -> tuple[Tensor, ...]:
    numel, indices, fields = given
    return (index_codecs.decode(codec, fields, numel, len(indices)),)


def _torch_encode(codec: str, given: Given) -> tuple[Tensor, ...]:
    numel, indices, _ = given
    return reference.encode(codec, indices, numel)


def _torch_decode(codec: str, given: Given) -> tuple[Tensor, ...]:
    numel, indices, fields = given
    return (reference.decode(codec, fields, numel, len(indices)),)


def _verify(
    run: Callable[[Given], tuple[Tensor, ...]],
    peer: Callable[[Given], tuple[Tensor, ...]],
    codec: str,
    k: int,
    pool: Pool,
) -> None:
    given = _prepare(codec, k, pool.apart())
    for ours, theirs in zip(run(given), peer(given), strict=True):
        if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            raise PeerMismatchError(f"{codec}: torch and gck disagree (n={pool.n}, {k=})")


def test_index_codecs(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
