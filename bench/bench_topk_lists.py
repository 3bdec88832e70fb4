"""gck.topk_ef_ of the parameters of a model, all in one call, against a call for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gck
from bench import peers
from bench.measure import Buffers, Pool
from bench.suite import GCK, Case, Plan
from gck.kernels.topk import resolve_k

RATIO = 0.01

Lists = tuple[list[Tensor], list[Tensor]]


def gpt2_sizes(
    width: int = 768, layers: int = 12, vocabulary: int = 50_257, context: int = 1024
) -> list[int]:
    """Elements of each parameter of GPT-2, whose head is its embedding: 148 tensors of 124,439,808."""
    norm = [width, width]
    attention = [width * 3 * width, 3 * width, width * width, width]
    perceptron = [width * 4 * width, 4 * width, 4 * width * width, width]
    layer = [*norm, *attention, *norm, *perceptron]
    return [vocabulary * width, context * width, *(layer * layers), *norm]


def cases(plan: Plan) -> list[Case]:
    """The cases in the order of measuring."""
    sizes = gpt2_sizes(32, 2, 1000, 64) if plan.quick else gpt2_sizes()
    total = sum(sizes)
    value = f"{len(sizes)} tensors"
    make = partial(Case, "topk_ef_", "tensors", value, total, torch.float32, prepare=partial(_split, sizes))
    return [
        make(GCK, _each),
        make("gck, a loop", _loop, partial(_verify_loop, sizes)),
        make("torch composition, a loop", _composition, partial(_verify_composition, sizes)),
        make("gck, flat=True", _flat, partial(_verify_flat, sizes)),
        make("gck, one tensor", _one, _verify_one, prepare=lambda buffers: buffers),
    ]


def _split(sizes: list[int], buffers: Buffers) -> Lists:
    return list(buffers.grad.split(sizes)), list(buffers.err.split(sizes))


def _each(lists: Lists) -> list[gck.SparseGrad]:
    return gck.topk_ef_(*lists, RATIO)


def _flat(lists: Lists) -> gck.SparseGrad:
    return gck.topk_ef_(*lists, RATIO, flat=True)


def _loop(lists: Lists) -> list[gck.SparseGrad]:
    return [gck.topk_ef_(grad, err, RATIO) for grad, err in zip(*lists, strict=True)]


def _one(buffers: Buffers) -> gck.SparseGrad:
    return gck.topk_ef_(buffers.grad, buffers.err, RATIO)


def _composition(lists: Lists) -> list[Any]:
    return [
        peers.torch_topk_of_(grad, err, resolve_k("bench", grad.numel(), RATIO, None))
        for grad, err in zip(*lists, strict=True)
    ]


def _same(ours: gck.SparseGrad, theirs: gck.SparseGrad) -> bool:
    return torch.equal(ours.values, theirs.values) and torch.equal(ours.indices, theirs.indices)


def _check(same: bool, name: str) -> None:
    if not same:
        raise peers.PeerMismatchError(f"topk_ef_ of a list: {name} and gck disagree")


def _verify_loop(sizes: list[int], pool: Pool) -> None:
    ours, theirs = pool.apart(), pool.apart()
    pairs = zip(_each(_split(sizes, ours)), _loop(_split(sizes, theirs)), strict=True)
    _check(all(_same(*pair) for pair in pairs) and torch.equal(ours.err, theirs.err), "a loop")


def _verify_composition(sizes: list[int], pool: Pool) -> None:
    ours, theirs = pool.apart(), pool.apart()
    for payload, (values, _) in zip(
        _each(_split(sizes, ours)), _composition(_split(sizes, theirs)), strict=True
    ):
        _check(torch.equal(payload.values.abs().sort().values, values.abs().sort().values), "the composition")


def _verify_flat(sizes: list[int], pool: Pool) -> None:
    """As one tensor: `_verify_one` says that one tensor keeps what it should."""
    ours, theirs = pool.apart(), pool.apart()
    same = _same(_flat(_split(sizes, ours)), _one(theirs))
    _check(same and torch.equal(ours.err, theirs.err), "flat=True")


def _verify_one(pool: Pool) -> None:
    peers.verify_topk(peers.torch_topk_ef_, pool, resolve_k("bench", pool.n, RATIO, None))


def test_topk_lists(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)
