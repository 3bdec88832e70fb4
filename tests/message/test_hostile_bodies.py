"""Bodies that collectives hand to compressors may hold anything: the result is the oracle's, or an error
that leaves everything as it was. (Under `make sanitize` reads out of bounds end the test, too.)"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.compressor import decompress_sum_, reduce_, server_of
from gck.errors import CorruptPayloadError
from gck.kernels.chunk_topk import ChunkTopK
from tests.cases import Guarded, one_nan, same_bytes
from tests.contract import VARIANTS
from tests.message.hostile import attempt

SMALL = [c for variants in VARIANTS.values() for c in variants if getattr(c, "chunk_size", 0) < 8192]
LARGE = [c for variants in VARIANTS.values() for c in variants if c not in SMALL]


def noise(generator: torch.Generator, rows: int, nbytes: int) -> Tensor:
    return torch.randint(0, 256, (rows, nbytes), dtype=torch.uint8, generator=generator)


def honest(compressor: Any, generator: torch.Generator, rows: int, n: int, capacity: int) -> Tensor:
    """(rows, nbytes) bodies of random vectors of n elements, laid out for `capacity`."""
    bodies = torch.zeros(rows, compressor.layout(capacity).nbytes, dtype=torch.uint8)
    for row in bodies:
        own = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
        compressor.compress_(torch.randn(n, generator=generator), None, own)
        for view, field in zip(
            compressor.layout(capacity).views(row), compressor.layout(n).views(own[0]), strict=True
        ):
            view[: field.numel()] = field
    return bodies


def spoilt(bodies: Tensor, generator: torch.Generator, changes: int) -> Tensor:
    """Some bytes replaced, or some bits turned."""
    if not bodies.numel():
        return bodies
    flat = bodies.view(-1)
    at = torch.randint(0, flat.numel(), (changes,), generator=generator)
    flat[at] = flat[at] ^ noise(generator, 1, changes)[0]
    return bodies


def with_ascending_indices(compressor: Any, bodies: Tensor, valid: Tensor, capacity: int) -> Tensor:
    """The indices of `valid`, so that what the other fields hold is looked at."""
    layout = compressor.layout(capacity)
    if compressor.name in ("topk", "chunk_topk") and layout.fields:
        # A codec makes two fields of them, behind values and scales.
        first = -1 if len(layout.fields) < 4 else 2
        start = layout.fields[first].offset
        bodies[:, start:] = valid[:, start:]
    return bodies


class Case:
    """Bodies, and what they are decoded to."""

    def __init__(self, compressor: Any, seed: int, n: int, rows: int, more: int, kind: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.compressor, self.n = compressor, n
        self.capacity = n + more * (compressor.shard_unit or 0)
        valid = honest(compressor, generator, rows, n, self.capacity)
        self.bodies = noise(generator, *valid.shape)
        if kind == "indices":
            self.bodies = with_ascending_indices(compressor, self.bodies, valid, self.capacity)
        elif kind == "spoilt":
            self.bodies = spoilt(valid.clone(), generator, 1 + seed % 5)
        elif kind == "extreme":
            self.bodies.fill_((0, 255, 127, 128)[seed % 4])
        self.fields = [compressor.layout(self.capacity).views(body) for body in self.bodies]

    def dense(self, row: int) -> Tensor:
        reference = import_module(f"{self.compressor.package}.reference")
        dense: Tensor = reference.decompress(self.compressor, self.own(self.fields[row]), self.n)
        return dense

    def own(self, fields: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of a body laid out for more, what belongs to the n elements."""
        if self.capacity == self.n:
            return fields
        return tuple(
            field[: place.count]
            for field, place in zip(fields, self.compressor.layout(self.n).fields, strict=True)
        )

    def returned(self, call: Callable[[], object], *written: Guarded) -> bool:
        """Whether the call did; if not, nothing is written. Never is anything beside what may be."""
        before = [guarded.inner.clone() for guarded in written]
        bodies = self.bodies.clone()
        done = attempt(call)
        assert torch.equal(self.bodies, bodies)
        assert all(guarded.intact() for guarded in written)
        assert done or all(map(same_bytes, [guarded.inner for guarded in written], before))
        return done

    def decompress(self) -> None:
        out = Guarded.of(torch.full((self.n,), 5.0))
        body = self.bodies[0]
        if self.returned(lambda: self.compressor.decompress_(out.inner, body, capacity=self.capacity), out):
            assert same_bytes(one_nan(out.inner), one_nan(self.dense(0)))

    def decompress_sum(self) -> None:
        out = Guarded.of(torch.full((self.n,), 5.0))
        if self.returned(
            lambda: decompress_sum_(self.compressor, out.inner, self.bodies, capacity=self.capacity), out
        ):
            assert same_bytes(one_nan(out.inner), one_nan(self.total()))

    def total(self) -> Tensor:
        total = torch.zeros(self.n)
        for row in range(len(self.bodies)):
            total = total + self.dense(row)
        return total

    def reduce(self) -> None:
        server = server_of(self.compressor, len(self.bodies))
        err = Guarded.of(torch.linspace(-2, 3, self.n))
        memory = torch.full((server.layout(self.n).nbytes + 96,), 77, dtype=torch.uint8)
        body = Guarded(memory, memory[48:-48])
        body.inner.zero_()
        wanted_err = err.inner.clone()
        if not self.returned(
            lambda: reduce_(
                self.compressor, self.bodies, err.inner, body.inner, self.n, capacity=self.capacity, divisor=3
            ),
            err,
            body,
        ):
            return
        reference = import_module(f"{server.package}.reference")
        fields, wanted_err, _ = reference.compress(server, self.total() / 3, wanted_err)
        assert same_bytes(err.inner, wanted_err)
        for got, field in zip(server.layout(self.n).views(body.inner), fields, strict=True):
            assert same_bytes(got, field.reshape(-1))


KINDS = st.sampled_from(["noise", "indices", "indices", "spoilt", "spoilt", "extreme"])


def check(compressor: Any, seed: int, n: int, rows: int, more: int, kind: str) -> None:
    case = Case(compressor, seed, n, rows, more, kind)
    case.decompress()
    case.decompress_sum()
    case.reduce()


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.integers(0, 2**32),
    st.integers(1, 700),
    st.integers(1, 3),
    st.integers(0, 2),
    KINDS,
)
def test_small(compressor: Any, seed: int, n: int, rows: int, more: int, kind: str) -> None:
    check(compressor, seed, n, rows, more, kind)


@pytest.mark.parametrize("kind", ["noise", "indices", "spoilt", "extreme"])
@pytest.mark.parametrize("compressor", LARGE, ids=str)
def test_large_chunks(compressor: Any, kind: str) -> None:
    check(compressor, 1, 70_001, 2, 1, kind)


@pytest.mark.parametrize(
    "compressor",
    [SMALL[0], ChunkTopK(), gck.Sign(), gck.Quantize(), gck.RandomK(k=9, seed=0), gck.LowRank()],
    ids=str,
)
def test_bodies_of_another_length(compressor: Any) -> None:
    nbytes = compressor.layout(500).nbytes
    out, err = torch.full((500,), 5.0), torch.ones(500)
    for wrong in (0, nbytes - 16, nbytes + 16, nbytes - 1):
        bodies = torch.zeros(2, -(-wrong // 16) * 16, dtype=torch.uint8)[:, :wrong]
        body = torch.zeros(server_of(compressor, 2).layout(500).nbytes, dtype=torch.uint8)
        with pytest.raises(CorruptPayloadError):
            compressor.decompress_(out, bodies[0])
        with pytest.raises(CorruptPayloadError):
            decompress_sum_(compressor, out, bodies)
        with pytest.raises(CorruptPayloadError):
            reduce_(compressor, bodies, err, body, 500)
    assert bool((out == 5).all())
    assert bool((err == 1).all())


def accepted(compressor: Any, kind: str) -> bool:
    body = Case(compressor, 1, 300, 1, 0, kind).bodies[0]
    return attempt(lambda: compressor.decompress_(torch.empty(300), body))


def test_both_outcomes_happen() -> None:
    """Noise is no list of ascending indices, and whatever else the fields hold is a value."""
    assert all(accepted(compressor, "indices") for compressor in SMALL)
    assert [accepted(compressor, "noise") for compressor in SMALL].count(False) >= 5
