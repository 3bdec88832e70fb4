"""From 8 ranks' packed payloads to that of their mean in one pass, as the owner of a shard makes it in the
two-phase all-reduce: beside the same by steps of gck, and of torch. And their sum alone, as a dense vector.

The floor is what must move: every payload read and one written, and the residual of the mean both ways; or
every payload read, and the sum written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gck
from bench import inputs, peers_decode
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan
from gck.compressor import reduce_, reduce_by_steps_

WORLD = 8
RESIDUAL_BYTES = 8  # an element: read and written
SUM_BYTES = 4  # an element: written
# What is measured, by name. A composition with two levels would sum in another order, and one with random
# numbers round by others: neither would be the same function.
COMPRESSORS: dict[str, Any] = {
    "sign": gck.Sign(256),
    "8 bits": gck.Quantize(8, 256),
    "4 bits": gck.Quantize(4, 256),
    "2 bits": gck.Quantize(2, 256),
    "top 64 of 4096": gck.ChunkTopK(64, 4096, server_k=64),  # one size, in and out, as of the others
}


class Given(NamedTuple):
    """(WORLD, nbytes) bodies as they are gathered, the residual, and where the body of the mean goes."""

    bodies: Tensor
    err: Tensor
    body: Tensor
    pool: Pool


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for name in plan.settings(tuple(COMPRESSORS), typical="sign"):
        payload = COMPRESSORS[name].layout(n).nbytes / n
        traffic = (WORLD + 1) * payload + RESIDUAL_BYTES
        prepare = partial(_prepare, name)
        make = partial(
            Case,
            "reduce_",
            "payloads",
            f"{WORLD} of {name}",
            n,
            torch.float32,
            bytes=traffic,
            prepare=prepare,
        )
        made.append(make(GCK, partial(_in_one_pass, name)))
        made.append(make("gck, by steps", partial(_by_steps, name), partial(_verify_steps, name)))
        made.append(make("torch composition", partial(_composed, name), partial(_verify_composed, name)))
        of_sum = {"bytes": WORLD * payload + SUM_BYTES, "prepare": prepare}
        make = partial(Case, "decompress", "payloads", f"{WORLD} of {name}", n, torch.float32, **of_sum)
        made.append(make(GCK, partial(_sum, name)))
        made.append(make("torch composition", partial(_composed_sum, name), partial(_verify_sum, name)))
    return made


def _prepare(name: str, buffers: Buffers) -> Given:
    pool = buffers.pool
    bodies, body = pool.made(("reduce", name), lambda: _gathered(pool, name))
    return Given(bodies, buffers.err, body, pool)


def _gathered(pool: Pool, name: str) -> tuple[Tensor, Tensor]:
    compressor, n = COMPRESSORS[name], pool.n
    bodies = torch.zeros(WORLD + 1, compressor.layout(n).nbytes, dtype=torch.uint8, device=pool.device)
    for rank, row in enumerate(bodies[:WORLD]):
        grad, _ = inputs.make(inputs.GAUSSIAN, n + rank)
        compressor.compress_(grad[:n].to(pool.device), None, row[None])
    return bodies[:WORLD], bodies[WORLD]


def _in_one_pass(name: str, given: Given) -> Tensor:
    reduce_(COMPRESSORS[name], given.bodies, given.err, given.body, given.pool.n, divisor=WORLD)
    return given.body


def _by_steps(name: str, given: Given) -> Tensor:
    reduce_by_steps_(COMPRESSORS[name], given.bodies, given.err, given.body, given.pool.n, divisor=WORLD)
    return given.body


def _composed(name: str, given: Given) -> tuple[Tensor, Tensor]:
    return peers_decode.torch_reduced_(_payloads(name, given), given.err, given.pool)


def _sum(name: str, given: Given) -> Tensor:
    return gck.decompress(_payloads(name, given), out=given.err)


def _composed_sum(name: str, given: Given) -> Tensor:
    given.err.zero_()
    for payload in _payloads(name, given):
        given.err.add_(peers_decode.torch_decoded(payload))
    return given.err


def _payloads(name: str, given: Given) -> list[Any]:
    return [peers_decode.payload_of(COMPRESSORS[name], body, given.pool.n) for body in given.bodies]


def _verify_steps(name: str, pool: Pool) -> None:
    results = []
    for run in (_in_one_pass, _by_steps):
        given = _prepare(name, pool.apart())
        results.append((run(name, given).clone(), given.err))
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise peers_decode.PeerMismatchError(f"reduce_: one pass and steps disagree ({name}, n={pool.n})")


def _verify_composed(name: str, pool: Pool) -> None:
    ours, theirs = _prepare(name, pool.apart()), _prepare(name, pool.apart())
    payload = peers_decode.payload_of(COMPRESSORS[name], _in_one_pass(name, ours), pool.n)
    composed = _composed(name, theirs)
    peers_decode.verify_reduced(payload, composed, (ours.err, theirs.err))


def _verify_sum(name: str, pool: Pool) -> None:
    ours, theirs = (call(name, _prepare(name, pool.apart())) for call in (_sum, _composed_sum))
    if not torch.equal(ours, theirs):
        raise peers_decode.PeerMismatchError(f"decompress: torch and gck disagree ({name}, n={pool.n})")


def test_reduce(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
