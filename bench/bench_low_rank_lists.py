"""gck.LowRank of all matrices of a model, with the collective around it, in a world of one: what a step takes
but for sending. Against torch: products of stacked matrices of one shape, as PyTorch's hook makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gck
from bench.bench_low_rank import TOLERANCE
from bench.measure import Buffers, Pool
from bench.peers import PeerMismatchError
from bench.suite import GCK, Case, Plan
from gck.collectives import SimulatedGroup, all_reduce_many_

COMPRESSOR = gck.LowRank(rank=4, seed=1)
WIDTHS = 768, 48  # of GPT-2, and of matrices so small that calls are most of it


class Model(NamedTuple):
    """Matrices, what stays of each, and what torch keeps for those of one shape."""

    grads: list[Tensor]
    states: list[gck.ErrorFeedback]
    alike: dict[tuple[int, ...], list[int]]
    bases: dict[tuple[int, ...], Tensor]


def shapes_of(width: int) -> list[tuple[int, int]]:
    """The matrices of the 12 layers of GPT-2."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return layer * 12


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    made = []
    for width in WIDTHS[1:] if plan.quick else WIDTHS:
        shapes = shapes_of(width)
        n = sum(rows * columns for rows, columns in shapes)
        value = f"{len(shapes)} of {width}"
        make = partial(Case, "LowRank, a step", "matrices", value, n, torch.float32)
        make = partial(make, prepare=partial(_model, shapes))
        made.append(make(GCK, _together))
        made.append(make("gck, a loop", _loop, partial(_verify, shapes, _loop, 0.0)))
        made.append(make("torch composition", composition, partial(_verify, shapes, composition, TOLERANCE)))
    return made


def _model(shapes: list[tuple[int, int]], buffers: Buffers) -> Model:
    sizes = [rows * columns for rows, columns in shapes]
    own = buffers.grad.clone()  # all-reduces write to it
    grads = [part.view(shape) for part, shape in zip(own.split(sizes), shapes, strict=True)]
    states, alike = [], dict[tuple[int, ...], list[int]]()
    for i, (err, shape) in enumerate(zip(buffers.err.split(sizes), shapes, strict=True)):
        states.append(gck.ErrorFeedback())
        states[-1].worker = err
        alike.setdefault(shape, []).append(i)
    bases = {
        shape: torch.stack([COMPRESSOR.for_shape(shape).basis(sizes[i], buffers.err.device).T for i in those])
        for shape, those in alike.items()
    }
    return Model(grads, states, alike, bases)


_member = SimulatedGroup(1).members[0]


def _together(model: Model) -> list[Tensor]:
    all_reduce_many_(model.grads, model.states, COMPRESSOR, _member, algorithm="factored")
    return model.grads


def _loop(model: Model) -> list[Tensor]:
    for grad, state in zip(model.grads, model.states, strict=True):
        gck.all_reduce_(grad, state, COMPRESSOR, _member, algorithm="factored")
    return model.grads


def composition(model: Model) -> list[Tensor]:
    """A step of torch's own operations; bases are kept from step to step."""
    for shape, those in model.alike.items():
        errs = [model.states[i].worker for i in those]
        matrices = torch.stack([model.grads[i] for i in those])
        matrices += torch.stack([err.view(shape) for err in errs if err is not None])
        left, _ = torch.linalg.qr(matrices @ model.bases[shape])
        right = matrices.transpose(1, 2) @ left
        decoded = left @ right.transpose(1, 2)
        matrices -= decoded
        model.bases[shape].copy_(right / right.norm())
        for i, rest, dense in zip(those, matrices, decoded, strict=True):
            model.grads[i].copy_(dense)
            err = model.states[i].worker
            if err is not None:
                err.view(shape).copy_(rest)
    return model.grads


def _verify(
    shapes: list[tuple[int, int]], peer: Callable[[Model], Any], tolerance: float, pool: Pool
) -> None:
    """The same results and residuals after a step, to within rounding, or to the bit."""
    ours, theirs = pool.apart(), pool.apart()
    sent, wanted = _together(_model(shapes, ours)), peer(_model(shapes, theirs))
    limit = tolerance * math.hypot(*[float(dense.norm()) for dense in sent])
    pairs = [*zip(sent, wanted, strict=True), (ours.err, theirs.err)]
    if not all(float((a - b).norm()) <= limit for a, b in pairs):
        raise PeerMismatchError(f"LowRank of many matrices: a peer and gck disagree (n={pool.n})")


def test_low_rank_lists(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
