"""The sum of messages that came one by one, as a server gets them from its clients: read where each of them
lies, beside copying them together first, adding one after the other, and torch.

The floor is what must move: every payload read, and the sum written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gck
from bench import inputs, peers_decode
from bench.bench_reduce import APART, SUM_BYTES
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan
from gck.wire import body_of, payloads_of

CLIENTS = 8
COMPRESSORS: dict[str, Any] = {
    "sign": gck.Sign(256),
    "8 bits": gck.Quantize(8, 256),
    "4 bits": gck.Quantize(4, 256),
    "top 64 of 4096, 2 bits": gck.ChunkTopK(64, 4096, 2),
    "top 1%": gck.TopK(ratio=0.01),
}

Given = tuple[Tensor, list[Any]]


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for name in plan.settings(tuple(COMPRESSORS), typical="sign"):
        traffic = CLIENTS * COMPRESSORS[name].layout(n).nbytes / n + SUM_BYTES
        of = {"value": f"{CLIENTS} of {name}", "n": n, "dtype": torch.float32, "bytes": traffic}
        make = partial(Case, "decompress", "messages", prepare=partial(_prepare, name), **of)
        made.append(make(implementation=GCK, run=_where_they_lie))
        for implementation, peer in PEERS.items():
            verify = partial(_verify, peer, name)
            made.append(make(implementation=implementation, run=peer, verify=verify))
    return made


def _prepare(name: str, buffers: Buffers) -> Given:
    """(a tensor to decode to, a payload of each client)."""
    return buffers.err, buffers.pool.made(("messages", name), lambda: _received(buffers.pool, name))


def _received(pool: Pool, name: str) -> list[Any]:
    grad, _ = inputs.make(inputs.GAUSSIAN, pool.n)
    body = torch.zeros(COMPRESSORS[name].layout(pool.n).nbytes, dtype=torch.uint8)
    received = []
    for client in range(CLIENTS):
        COMPRESSORS[name].compress_(grad.roll(client * APART), None, body.zero_()[None])
        payload = peers_decode.payload_of(COMPRESSORS[name], body, pool.n)
        if isinstance(payload, gck.ChunkSparse):  # rows, which messages have
            chunks = payload.scales.numel() // 2
            fields = (field.view(chunks, -1) for field in payload.fields)
            payload = gck.ChunkSparse(*fields, *payload[len(payload.fields) :])
        received.append(gck.from_bytes(gck.to_bytes(payload, checksum=False), device=pool.device))
    return received


def _where_they_lie(given: Given) -> Tensor:
    out, payloads = given
    return gck.decompress(payloads, out=out)


def _together_first(given: Given) -> Tensor:
    out, payloads = given
    rows = torch.stack([body_of(*payload.fields) for payload in payloads])
    return gck.decompress(payloads_of(payloads[0], rows), out=out)


def _one_by_one(given: Given) -> Tensor:
    out, payloads = given
    out.zero_()
    for payload in payloads:
        gck.decompress_add_(out, payload)
    return out


def _composed(given: Given) -> Tensor:
    out, payloads = given
    out.zero_()
    for payload in payloads:
        out.add_(peers_decode.torch_decoded(payload))
    return out


PEERS: dict[str, Callable[[Given], Tensor]] = {
    "gck, together first": _together_first,
    "gck, one by one": _one_by_one,
    "torch composition": _composed,
}


def _verify(peer: Callable[[Given], Tensor], name: str, pool: Pool) -> None:
    ours, theirs = (call(_prepare(name, pool.apart())) for call in (_where_they_lie, peer))
    if not torch.equal(ours, theirs):
        raise peers_decode.PeerMismatchError(
            f"decompress: {peer.__name__} and gck disagree ({CLIENTS} of {name}, n={pool.n})"
        )


def test_messages(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
