"""gck.decompress and gck.decompress_add_: of gathered top-k payloads, against torch's index_add_; and of one
payload of each other kind and format, against torch operations that unpack it.

The floor is what must move: the payload read, and the result written, or read and written. All of the result
counts, also where few entries are added to it, which touch a part of it only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gck
from bench import inputs, peers, peers_decode
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan, percent
from gck.kernels.topk import resolve_k

SETTINGS = ((1, 0.001), (1, 0.01), (8, 0.001), (8, 0.01))  # payloads, ratio

# Payloads of one rank, by name: what makes them.
SINGLE: dict[str, Any] = {
    "sign": gck.Sign(256),
    "8 bits": gck.Quantize(8, 256),
    "4 bits": gck.Quantize(4, 256),
    "2 bits": gck.Quantize(2, 256),
    "2 bits, mean": gck.Quantize(2, 256, scale="mean"),
    "top 64 of 4096, 32 bits": gck.ChunkTopK(64, 4096, 32),
    "top 64 of 4096, 16 bits": gck.ChunkTopK(64, 4096),
    "top 64 of 4096, 8 bits": gck.ChunkTopK(64, 4096, 8),
    "top 64 of 4096, 4 bits": gck.ChunkTopK(64, 4096, 4),
    "top 64 of 4096, 2 bits": gck.ChunkTopK(64, 4096, 2),
    "top 1%, bf16": gck.TopK(ratio=0.01, value_dtype=torch.bfloat16),
    "top 1%, 8 bits": gck.TopK(ratio=0.01, value_bits=8),
    "top 1%, 8 bits, block16": gck.TopK(ratio=0.01, value_bits=8, index_codec="block16"),
    "top 1%, 4 bits, elias_fano": gck.TopK(ratio=0.01, value_bits=4, index_codec="elias_fano"),
    "random 1%": gck.RandomK(ratio=0.01, seed=1),
}
ALPHA = 0.5

Given = tuple[Tensor, list[gck.SparseGrad]]
GivenOne = tuple[Tensor, Any]


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for world, ratio in plan.settings(SETTINGS, typical=(8, 0.01)):
        shared = {"prepare": partial(_prepare, world, ratio)}
        value = f"{world} of {percent(ratio)}"
        # Bytes of out: written, or read and written. An entry of a payload has 8.
        for kernel, run, peer, dense in (
            ("decompress", _decompress, _index_add_to_zeros, 4),
            ("decompress_add_", _decompress_add_, _index_add_, 8),
        ):
            traffic = 8 * world * ratio + dense
            make = partial(Case, kernel, "payloads", value, n, torch.float32, bytes=traffic, **shared)
            made.append(make(GCK, run))
            made.append(make("torch index_add_", peer, partial(_verify, run, peer, world, ratio)))
            if kernel == "decompress":
                verify = partial(_verify, run, _decompress_anew, world, ratio)
                made.append(make("gck, new tensor", _decompress_anew, verify))
    for name in plan.settings(tuple(SINGLE), typical="sign"):
        payload = SINGLE[name].layout(n).nbytes / n
        for kernel, dense_run, dense_peer, dense in (
            ("decompress", _decompress_one, _unpack, 4),
            ("decompress_add_", _decompress_add_one_, _unpack_and_add_, 8),
        ):
            of = {"bytes": dense + payload, "prepare": partial(_prepare_one, name)}
            make = partial(Case, kernel, "payloads", name, n, torch.float32, **of)
            made.append(make(GCK, dense_run))
            made.append(
                make("torch composition", dense_peer, partial(_verify_one, dense_run, dense_peer, name))
            )
            if kernel == "decompress":
                # What it takes to write as much: memory may be written slower than it is read.
                made.append(make("torch fill_ alone", _fill, _verify_fill))
                if isinstance(SINGLE[name], gck.RandomK):
                    known = {"verify": partial(_verify_known, name), "prepare": partial(_prepare_known, name)}
                    made.append(make("torch index_copy_ alone", _index_copy, **known))
    return made


def _prepare_one(name: str, buffers: Buffers) -> GivenOne:
    """(a tensor to decode to, one payload)."""
    return buffers.err, buffers.pool.made(name, lambda: _one(buffers.pool, name))


def _one(pool: Pool, name: str) -> Any:
    grad, _ = inputs.make(inputs.GAUSSIAN, pool.n)
    body = torch.zeros(1, SINGLE[name].layout(pool.n).nbytes, dtype=torch.uint8, device=pool.device)
    SINGLE[name].compress_(grad.to(pool.device), None, body)
    return peers_decode.payload_of(SINGLE[name], body[0], pool.n)


def _decompress_one(given: GivenOne) -> Tensor:
    return gck.decompress(given[1], out=given[0])


def _decompress_add_one_(given: GivenOne) -> Tensor:
    return gck.decompress_add_(given[0], given[1], ALPHA)


def _unpack(given: GivenOne) -> Tensor:
    return given[0].copy_(peers_decode.torch_decoded(given[1]))


def _unpack_and_add_(given: GivenOne) -> Tensor:
    # Not add_(…, alpha=ALPHA), which may round once for the product and the sum.
    return given[0].add_(peers_decode.torch_decoded(given[1]).mul_(ALPHA))


def _fill(given: GivenOne) -> Tensor:
    return given[0].fill_(ALPHA)


def _prepare_known(name: str, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """(a tensor to decode to, places, values): of random-k, where nobody has to make places of the seed."""
    out, payload = _prepare_one(name, buffers)

    def places() -> Tensor:
        ones = payload._replace(values=torch.ones_like(payload.values))
        return gck.decompress(ones).nonzero().view(-1)

    return out, buffers.pool.made((name, "places"), places), payload.values


def _index_copy(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    out, places, values = given
    return out.zero_().index_copy_(0, places, values)


def _verify_known(name: str, pool: Pool) -> None:
    ours, theirs = _decompress_one(_prepare_one(name, pool.apart())), _prepare_known(name, pool.apart())
    if not torch.equal(ours, _index_copy(theirs)):
        raise peers.PeerMismatchError(f"decompress: index_copy_ and gck disagree (n={pool.n}, {name})")


def _verify_fill(pool: Pool) -> None:
    """Not the same function; it writes all that a decoder writes."""
    if not bool((_fill((pool.apart().err, None)) == ALPHA).all()):
        raise peers.PeerMismatchError(f"fill_: not all is written (n={pool.n})")


def _verify_one(
    run: Callable[[GivenOne], Tensor], peer: Callable[[GivenOne], Tensor], name: str, pool: Pool
) -> None:
    ours, theirs = (call(_prepare_one(name, pool.apart())) for call in (run, peer))
    if not torch.equal(ours, theirs):
        raise peers.PeerMismatchError(f"decompress: {peer.__name__} and gck disagree (n={pool.n}, {name})")


def _prepare(world: int, ratio: float, buffers: Buffers) -> Given:
    """(a tensor to decode to, payloads of as many ranks in one buffer, as they are gathered)."""
    pool = buffers.pool
    return buffers.err, pool.made((world, ratio), lambda: _gathered(pool, world, ratio))


def _gathered(pool: Pool, world: int, ratio: float) -> list[gck.SparseGrad]:
    n = pool.n
    layout = gck.TopK(k=resolve_k("bench", n, ratio, None)).layout(n)
    rows = torch.zeros(world, layout.nbytes, dtype=torch.uint8, device=pool.device)
    for rank, row in enumerate(rows):
        grad, err = inputs.make(inputs.GAUSSIAN, n + rank)
        grad, err = grad[:n].to(pool.device), err[:n].to(pool.device)
        gck.TopK(ratio=ratio).compress_(grad, err, row.unsqueeze(0))
    return [gck.SparseGrad(*layout.views(row), n) for row in rows]


def _decompress(given: Given) -> Tensor:
    out, payloads = given
    return gck.decompress(payloads, out=out)


def _decompress_anew(given: Given) -> Tensor:
    return gck.decompress(given[1])


def _decompress_add_(given: Given) -> Tensor:
    out, payloads = given
    return gck.decompress_add_(out, payloads)


def _index_add_(given: Given) -> Tensor:
    out, payloads = given
    for payload in payloads:
        out.index_add_(0, payload.indices, payload.values)
    return out


def _index_add_to_zeros(given: Given) -> Tensor:
    given[0].zero_()
    return _index_add_(given)


def _verify(
    run: Callable[[Given], Tensor],
    peer: Callable[[Given], Tensor],
    world: int,
    ratio: float,
    pool: Pool,
) -> None:
    ours, theirs = (call(_prepare(world, ratio, pool.apart())) for call in (run, peer))
    if not torch.equal(ours, theirs):
        raise peers.PeerMismatchError(
            f"decompress: {peer.__name__} and gck disagree (n={pool.n}, {world} payloads of {ratio=})"
        )


def test_decode(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
