"""From several ranks' packed payloads to that of their mean in one pass, as the owner of a shard makes it in
the two-phase all-reduce, beside the same by steps of gck, and of torch; and their sum alone, a dense vector.

The floor is what must move: every payload read and one written, and the residual of the mean both ways; or
every payload read, and the sum written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gck
from bench import inputs, peers_decode
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan
from gck.compressor import reduce_, reduce_by_steps_

WORLD, OTHERS = 8, (2, 32)
APART = 4099  # elements between what two ranks have of the same draw
RESIDUAL_BYTES = 8  # an element: read and written
SUM_BYTES = 4  # an element: written
# What is measured, by name. One with random numbers would round by others in torch.
COMPRESSORS: dict[str, Any] = {
    "sign": gck.Sign(256),
    "8 bits": gck.Quantize(8, 256),
    "4 bits": gck.Quantize(4, 256),
    "2 bits": gck.Quantize(2, 256),
    "2 bits, mean": gck.Quantize(2, 256, scale="mean"),
    # One size, in and out, as of the others.
    "top 64 of 4096": gck.ChunkTopK(64, 4096, server_k=64),
    "top 64 of 4096, 2 bits": gck.ChunkTopK(64, 4096, 2, server_k=64),
}
TYPICAL = ("sign", "4 bits")
# The residual of the mean fades, and is bounded; nothing else differs.
OPTIONS = {"decay": 0.9, "clip": 1.0}
COMPRESSORS |= {f"{name}, decay, clip": replace(COMPRESSORS[name], **OPTIONS) for name in TYPICAL}


class Setting(NamedTuple):
    """As many payloads of a compressor of COMPRESSORS."""

    world: int
    name: str

    def __str__(self) -> str:
        return f"{self.world} of {self.name}"

    @property
    def compressor(self) -> Any:
        return COMPRESSORS[self.name]


SETTINGS = [
    *(Setting(WORLD, name) for name in COMPRESSORS),
    *(Setting(world, name) for world in OTHERS for name in TYPICAL),
]


class Given(NamedTuple):
    """(world, nbytes) bodies as they are gathered, the residual, and where the body of the mean goes."""

    bodies: Tensor
    err: Tensor
    body: Tensor
    pool: Pool


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    n, made = plan.large, []
    for setting in plan.settings(tuple(SETTINGS), typical=SETTINGS[0]):
        payload = setting.compressor.layout(n).nbytes / n
        traffic = (setting.world + 1) * payload + RESIDUAL_BYTES
        of = {"value": str(setting), "n": n, "dtype": torch.float32, "prepare": partial(_prepare, setting)}
        make = partial(Case, "reduce_", "payloads", bytes=traffic, **of)
        # Unpacked one by one on a CPU, so many payloads take seconds.
        composed = setting.world <= WORLD or plan.device.type == "cuda"
        made.append(_case(make, GCK, partial(_in_one_pass, setting)))
        made.append(
            _case(make, "gck, by steps", partial(_by_steps, setting), partial(_verify_steps, setting))
        )
        if composed:
            verify = partial(_verify_composed, setting)
            made.append(_case(make, "torch composition", partial(_composed, setting), verify))
        if setting.compressor.decay != 1:
            continue  # the sum alone knows no residual
        make = partial(Case, "decompress", "payloads", bytes=setting.world * payload + SUM_BYTES, **of)
        made.append(_case(make, GCK, partial(_sum, setting)))
        name, run = ("torch composition", _composed_sum) if composed else ("gck, one by one", _one_by_one)
        made.append(_case(make, name, partial(run, setting), partial(_verify_sum, run, setting)))
    return made


def _case(
    make: Callable[..., Case],
    implementation: str,
    run: Callable[[Given], Any],
    verify: Callable[[Pool], None] | None = None,
) -> Case:
    return make(implementation=implementation, run=run, verify=verify)


def _prepare(setting: Setting, buffers: Buffers) -> Given:
    pool = buffers.pool
    bodies, body = pool.made(("reduce", setting), lambda: _gathered(pool, setting))
    return Given(bodies, buffers.err, body, pool)


def _gathered(pool: Pool, setting: Setting) -> tuple[Tensor, Tensor]:
    nbytes = setting.compressor.layout(pool.n).nbytes
    bodies = torch.zeros(setting.world + 1, nbytes, dtype=torch.uint8, device=pool.device)
    grad = inputs.make(inputs.GAUSSIAN, pool.n)[0].to(pool.device)
    for rank, row in enumerate(bodies[: setting.world]):
        setting.compressor.compress_(grad.roll(rank * APART), None, row[None])
    return bodies[: setting.world], bodies[setting.world]


def _in_one_pass(setting: Setting, given: Given) -> Tensor:
    bodies, err, body, pool = given
    reduce_(setting.compressor, bodies, err, body, pool.n, divisor=setting.world)
    return body


def _by_steps(setting: Setting, given: Given) -> Tensor:
    bodies, err, body, pool = given
    reduce_by_steps_(setting.compressor, bodies, err, body, pool.n, divisor=setting.world)
    return body


def _composed(setting: Setting, given: Given) -> tuple[Tensor, Tensor]:
    if setting.compressor.decay != 1:
        given.err.mul_(OPTIONS["decay"]).clamp_(-OPTIONS["clip"], OPTIONS["clip"])
    return peers_decode.torch_reduced_(_payloads(setting, given), given.err, given.pool)


def _sum(setting: Setting, given: Given) -> Tensor:
    return gck.decompress(_payloads(setting, given), out=given.err)


def _composed_sum(setting: Setting, given: Given) -> Tensor:
    given.err.zero_()
    for payload in _payloads(setting, given):
        given.err.add_(peers_decode.torch_decoded(payload))
    return given.err


def _one_by_one(setting: Setting, given: Given) -> Tensor:
    given.err.zero_()
    for payload in _payloads(setting, given):
        gck.decompress_add_(given.err, payload)
    return given.err


def _payloads(setting: Setting, given: Given) -> list[Any]:
    return [peers_decode.payload_of(setting.compressor, body, given.pool.n) for body in given.bodies]


def _verify_steps(setting: Setting, pool: Pool) -> None:
    results = []
    for run in (_in_one_pass, _by_steps):
        given = _prepare(setting, pool.apart())
        results.append((run(setting, given).clone(), given.err))
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise peers_decode.PeerMismatchError(f"reduce_: one pass and steps disagree ({setting}, n={pool.n})")


def _verify_composed(setting: Setting, pool: Pool) -> None:
    ours, theirs = _prepare(setting, pool.apart()), _prepare(setting, pool.apart())
    payload = peers_decode.payload_of(setting.compressor, _in_one_pass(setting, ours), pool.n)
    composed = _composed(setting, theirs)
    peers_decode.verify_reduced(payload, composed, (ours.err, theirs.err))


def _verify_sum(peer: Callable[[Setting, Given], Tensor], setting: Setting, pool: Pool) -> None:
    ours, theirs = (call(setting, _prepare(setting, pool.apart())) for call in (_sum, peer))
    if not torch.equal(ours, theirs):
        raise peers_decode.PeerMismatchError(
            f"decompress: {peer.__name__} and gck disagree ({setting}, n={pool.n})"
        )


def test_reduce(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
