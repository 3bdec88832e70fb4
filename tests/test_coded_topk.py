"""Top-k whose indices travel by a codec, and values in few bits: sizes, payloads, sums, hostile bytes."""

from __future__ import annotations

import dataclasses
import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError
from gck.kernels.topk import cpu, reference
from tests.cases import make, same_bytes

CODED = [
    gck.TopK(ratio=0.01, index_codec="elias_fano"),
    gck.TopK(ratio=0.02, index_codec="elias_fano", value_bits=4),
    gck.TopK(ratio=0.4, index_codec="block16", value_bits=8),
    gck.TopK(k=30, index_codec="int32", value_bits=4),
    gck.TopK(k=30, index_codec="block16", value_dtype=torch.float16),
]


def entropy(numel: int, k: int) -> float:
    """Bits an index that any code needs: log2 of the number of sets of k of numel elements, over k."""
    nats = math.lgamma(numel + 1) - math.lgamma(k + 1) - math.lgamma(numel - k + 1)
    return nats / math.log(2) / k


@pytest.mark.parametrize("value_bits", [16, 4])
@pytest.mark.parametrize("numel", [1_000_000, 25_000_000])
def test_payload_is_near_the_entropy(numel: int, value_bits: int) -> None:
    compressor = gck.TopK(ratio=0.01, index_codec="elias_fano", value_bits=value_bits)
    k = numel // 100
    bits = 8 * compressor.layout(numel).nbytes / k
    assert 8.07 < entropy(numel, k) < 8.09
    assert bits <= 1.05 * (entropy(numel, k) + value_bits)
    body = torch.zeros(1, compressor.layout(10_000).nbytes, dtype=torch.uint8)
    compressor.compress_(torch.randn(10_000), torch.zeros(10_000), body)
    assert compressor.payload(body[0], 10_000).nbytes == body.numel()


def test_value_bits_is_short_for_a_dtype() -> None:
    assert gck.TopK(k=1, value_bits=16) == gck.TopK(k=1, value_dtype=torch.bfloat16)
    assert gck.TopK(k=1, value_bits=32) == gck.TopK(k=1)
    assert gck.TopK(k=1, value_bits=16, value_dtype=torch.float16) == gck.TopK(k=1, value_dtype=torch.float16)
    four = gck.TopK(k=1, value_bits=4)
    assert (four.value_dtype, four.value_bits) == (torch.float32, 4)
    assert dataclasses.replace(four, k=2) == gck.TopK(k=2, value_bits=4)
    assert four != gck.TopK(k=1) != gck.TopK(k=1, index_codec="block16")


def test_wrong_options() -> None:
    with pytest.raises(ArgumentError, match=r"TopK: index_codec must be one of .*, got 'zip'"):
        gck.TopK(k=1, index_codec="zip")
    with pytest.raises(ArgumentError, match="TopK: value_bits must be one of 32, 16, 8, 4, got 2"):
        gck.TopK(k=1, value_bits=2)
    with pytest.raises(DtypeError, match=r"TopK: value_bits must be an int or None, got '4' \(str\)"):
        gck.TopK(k=1, value_bits="4")  # type: ignore[arg-type]
    for bits in (32, 8, 4):
        with pytest.raises(ArgumentError, match=rf"value_bits {bits} does not go with value_dtype torch\.bf"):
            gck.TopK(k=1, value_bits=bits, value_dtype=torch.bfloat16)


def bodies_of(compressor: gck.TopK, n: int, ranks: int) -> tuple[Tensor, list[Tensor]]:
    """The payloads of several ranks, in rows that are further apart than they are long; and their decoded."""
    layout = compressor.layout(n)
    bodies = torch.zeros(ranks, layout.nbytes + 32, dtype=torch.uint8)[:, : layout.nbytes]
    dense = []
    for rank, case in zip(range(ranks), ("gaussian", "ties", "few nonfinite", "clustered"), strict=False):
        grad, err = make(case, n, torch.float32)
        fields, _, _ = reference.compress(compressor, grad, err)
        compressor.compress_(grad, err, bodies[rank].unsqueeze(0))
        for view, field in zip(layout.views(bodies[rank]), fields, strict=True):
            assert same_bytes(view, field)
        dense.append(reference.decompress(compressor, fields, n))
    return bodies, dense


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("compressor", CODED, ids=str)
def test_sums_are_row_by_row(compressor: gck.TopK, backend: str) -> None:
    if backend == "gpu" and torch.cuda.is_available():
        pytest.skip("compiled for the device, this is a test of tensors there")
    kernels = import_module(f"gck.kernels.topk.{backend}")
    n = 3000
    bodies, dense = bodies_of(compressor, n, 3)
    base = torch.linspace(-3, 5, n)
    for alpha, accumulate in ((1.0, False), (-0.3, True)):
        wanted = base.clone() if accumulate else torch.zeros(n)
        for body in bodies:
            cpu.decompress_(compressor, wanted, compressor.layout(n).views(body), alpha, True)
        out = base.clone() if accumulate else torch.full((n,), math.nan)
        kernels.decompress_sum_(compressor, out, bodies, compressor.layout(n), alpha, accumulate)
        assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0))
    total = torch.zeros(n)
    for each in dense:
        total += each
    out = torch.empty(n)
    compressor.decompress_sum_(out, bodies)
    assert torch.equal(out.nan_to_num(7.0), total.nan_to_num(7.0))


@pytest.mark.parametrize("compressor", CODED, ids=str)
def test_payloads(compressor: gck.TopK) -> None:
    n = 3000
    bodies, dense = bodies_of(compressor, n, 2)
    payloads = [compressor.payload(body, n) for body in bodies]
    assert all(isinstance(payload, gck.CodedSparse) and payload.compressor == "topk" for payload in payloads)
    assert torch.equal(gck.decompress(payloads[0]), dense[0])
    assert torch.equal(gck.decompress(payloads), dense[0] + dense[1])
    assert payloads[0].nbytes == compressor.layout(n).nbytes
    plain = gck.TopK(k=3).payload(gck.wire.body_of(torch.ones(3), torch.arange(3, dtype=torch.int32)), n)
    assert isinstance(plain, gck.SparseGrad)
    assert gck.decompress(plain).sum() == 3


@pytest.mark.parametrize("index_codec", ["block16", "elias_fano"])
def test_encode_indices(index_codec: str) -> None:
    grad, _ = make("gaussian", 70_001, torch.float32)
    payload = gck.topk(grad, 0.01, value_dtype=torch.bfloat16)
    coded = gck.encode_indices(payload, index_codec)
    assert coded.values is payload.values
    assert coded.nbytes < payload.nbytes
    assert torch.equal(gck.decompress(coded), gck.decompress(payload))
    assert torch.equal(gck.decompress([coded, coded]), 2 * gck.decompress(payload))
    nothing = gck.encode_indices(gck.topk(torch.empty(0), 0.1), index_codec)
    assert nothing.nbytes == gck.decompress(nothing).numel() == 0


def test_encode_indices_of_what_is_wrong() -> None:
    good = gck.topk(torch.randn(100), k=5)
    with pytest.raises(
        DtypeError,
        match=r"encode_indices: payload must be a SparseGrad, got a tensor of shape \(5,\), torch.float32",
    ):
        gck.encode_indices(good.values)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r'encode_indices: index_codec must be .* got "int32"'):
        gck.encode_indices(good, "int32")
    for bad in (
        good._replace(numel=4),
        good._replace(indices=good.indices[:4]),
        good._replace(numel=int(good.indices[-1])),
    ):
        with pytest.raises(CorruptPayloadError, match=r"^encode_indices: "):
            gck.encode_indices(bad)
    with pytest.raises(CorruptPayloadError, match=r"encode_indices: indices must ascend within \[0, 100\)"):
        gck.encode_indices(good._replace(indices=good.indices.flip(0)))


@pytest.mark.parametrize("compressor", CODED, ids=str)
def test_sums_with_a_weight_each(compressor: gck.TopK) -> None:
    n, weights = 3000, [0.5, -3.0, 1.0]
    bodies, _ = bodies_of(compressor, n, 3)
    payloads = [compressor.payload(body, n) for body in bodies]
    out, wanted = torch.linspace(-1, 1, n), torch.linspace(-1, 1, n)
    for payload, weight in zip(payloads, weights, strict=True):
        gck.decompress_add_(wanted, payload, weight)
    assert gck.decompress_add_(out, payloads, weights) is out
    assert same_bytes(out, wanted)


@pytest.mark.parametrize("compressor", [c for c in CODED if c.index_codec != "int32"], ids=str)
def test_damaged_payloads_change_nothing(compressor: gck.TopK) -> None:
    n = 3000
    bodies, _ = bodies_of(compressor, n, 2)
    out = torch.full((n,), 5.0)
    place = compressor.layout(n).fields[3]
    bodies[1, place.offset] ^= 1
    with pytest.raises(CorruptPayloadError, match=r"TopK\.decompress_: \w+ indices: "):
        compressor.decompress_(out, bodies[1].clone())
    with pytest.raises(CorruptPayloadError, match=r"TopK\.decompress_sum_: payload 1: \w+ indices: "):
        compressor.decompress_sum_(out, bodies)
    assert (out == 5).all()


BAD: list[tuple[type[Exception], dict[str, Any]]] = [
    (CorruptPayloadError, {"k": 29}),
    (CorruptPayloadError, {"k": 0}),
    (CorruptPayloadError, {"scales": torch.ones(3)}),
    (CorruptPayloadError, {"index_low": torch.zeros(31).to(torch.uint16)}),
    (CorruptPayloadError, {"numel": 10_000_000}),
    (CorruptPayloadError, {"value_bits": 8}),
    (CorruptPayloadError, {"index_codec": "elias_fano"}),
    (DtypeError, {"k": 30.0}),
    (ArgumentError, {"k": -1}),
    (ArgumentError, {"value_bits": 5}),
    (ArgumentError, {"index_codec": "zip"}),
]


@pytest.mark.parametrize(("error", "change"), BAD, ids=str)
def test_payloads_that_contradict_themselves(error: type[Exception], change: dict[str, Any]) -> None:
    compressor = gck.TopK(k=30, index_codec="block16", value_bits=4)
    bodies, _ = bodies_of(compressor, 3000, 1)
    payload = compressor.payload(bodies[0], 3000)
    with pytest.raises(error, match=r"^(decompress|TopK): "):
        gck.decompress(payload._replace(**change))


def test_codes_keep_their_error_in_the_residual() -> None:
    """Over many steps of one gradient, all of it arrives: what codes lose is sent later."""
    n, steps = 2000, 60
    grad, _ = make("gaussian", n, torch.float32)
    compressor = gck.TopK(ratio=0.2, index_codec="elias_fano", value_bits=4)
    err, total, out = torch.zeros(n), torch.zeros(n, dtype=torch.float64), torch.empty(n)
    for _ in range(steps):
        body = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
        compressor.compress_(grad, err, body)
        compressor.decompress_(out, body[0])
        total += out
    assert torch.allclose(total + err, steps * grad.double(), atol=1e-3)
    assert err.abs().max() < 12 * grad.abs().max()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("compressor", CODED[:3], ids=str)
def test_all_reduce(compressor: gck.TopK, world_size: int) -> None:
    n = 3000
    inputs = [make("gaussian", n + rank, torch.float32)[0][:n] for rank in range(world_size)]

    def work(group: Any) -> tuple[Tensor, Tensor]:
        grad, state = inputs[group.rank].clone(), gck.ErrorFeedback()
        gck.all_reduce_(grad, state, compressor, group, algorithm="one_phase")
        assert state.worker is not None
        return grad, state.worker

    results = gck.SimulatedGroup(world_size).run(work)
    wanted = torch.zeros(n)
    for rank, grad in enumerate(inputs):
        fields, left, _ = reference.compress(compressor, grad, torch.zeros(n))
        wanted += reference.decompress(compressor, fields, n)
        assert same_bytes(results[rank][1], left)
    wanted = wanted / torch.tensor(float(world_size))
    assert all(same_bytes(grad, wanted) for grad, _ in results)


def test_sparse_all_gather() -> None:
    payloads = [
        gck.encode_indices(gck.topk(make("gaussian", 5000 + r, torch.float32)[0][:5000], 0.02))
        for r in range(3)
    ]
    gathered = gck.SimulatedGroup(3).run(lambda group: gck.sparse_all_gather(payloads[group.rank], group))
    wanted = sum((gck.decompress(payload) for payload in payloads), torch.zeros(5000))
    for received in gathered:
        assert all(a.nbytes == b.nbytes for a, b in zip(received, payloads, strict=True))
        assert torch.equal(gck.decompress(received), wanted)
