"""The functional API: what it returns and leaves, and decompression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gck
from gck.errors import (
    ArgumentError,
    AutogradError,
    CorruptPayloadError,
    DtypeError,
    LayoutError,
    ShapeMismatchError,
)
from gck.kernels.chunk_topk import reference as chunk_topk_reference
from gck.kernels.low_rank import reference as low_rank_reference
from gck.kernels.quantize import reference as quantize_reference
from gck.kernels.random_k import Unbiased
from gck.kernels.random_k import reference as random_k_reference
from gck.kernels.sign import reference as sign_reference
from gck.kernels.topk import reference as topk_reference
from gck.wire import body_of
from tests.cases import same_bytes
from tests.ops_calls import pair


def test_topk_ef() -> None:
    grad, err = pair()
    (values, indices), residual, _ = topk_reference.compress(gck.TopK(ratio=0.01), grad, err)
    payload = gck.topk_ef_(grad.view(10, 100), err, 0.01)
    assert isinstance(payload, gck.SparseGrad)
    assert same_bytes(payload.values, values)
    assert same_bytes(payload.indices, indices)
    assert payload.numel == 1000
    assert same_bytes(err, residual)
    assert payload.nbytes == 48 + 48  # ten fp32, ten int32, each up to a multiple of 16


def test_topk_k_and_value_dtype() -> None:
    grad, err = pair()
    wanted = topk_reference.compress(gck.TopK(k=7, value_dtype=torch.bfloat16), grad, err)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    payload = gck.topk_ef_(grad, err, k=7, value_dtype=torch.bfloat16, nonfinite=nonfinite)
    assert same_bytes(payload.values, wanted[0][0])
    assert same_bytes(err, wanted[1])
    assert int(nonfinite) == 0


def test_topk_without_error_feedback() -> None:
    grad, _ = pair()
    before = grad.clone()
    payload = gck.topk(grad, 0.05)
    wanted = grad.abs().topk(50)
    assert torch.equal(payload.indices.long(), wanted.indices.sort().values)
    assert torch.equal(payload.values, grad[payload.indices.long()])
    assert torch.equal(grad, before)


def test_sign_ef() -> None:
    grad, err = pair(1000, torch.bfloat16)
    (words, scales), residual, _ = sign_reference.compress(gck.Sign(64), grad, err)
    payload = gck.sign_ef_(grad, err, chunk_size=64)
    assert same_bytes(payload.words, words)
    assert same_bytes(payload.scales, scales)
    assert (payload.numel, payload.chunk_size, payload.nbytes) == (1000, 64, 128 + 64)
    assert same_bytes(err, residual)


@pytest.mark.parametrize("value_bits", [32, 16, 8, 4, 2])
def test_chunk_topk_ef(value_bits: int) -> None:
    grad, err = pair(1000, torch.bfloat16)
    compressor = gck.ChunkTopK(k=9, chunk_size=128, value_bits=value_bits, index_bits=16)
    fields, residual, cleared = chunk_topk_reference.compress(compressor, grad, err)
    without = gck.chunk_topk(grad, 128, 9, value_bits=value_bits)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    payload = gck.chunk_topk_ef_(grad, err, 128, 9, value_bits=value_bits, nonfinite=nonfinite)
    assert isinstance(payload, gck.ChunkSparse)
    assert all(same_bytes(a.flatten(), b) for a, b in zip(payload.fields, fields, strict=True))
    assert payload.indices.shape == (8, 9)
    assert payload.indices.dtype == torch.uint16
    assert payload.values.shape == (8, {32: 9, 16: 9, 8: 9, 4: 5, 2: 3}[value_bits])
    assert payload.scales.shape == (8, {32: 0, 16: 0, 8: 1, 4: 1, 2: 2}[value_bits])
    assert payload[3:] == (1000, 128, 9, value_bits)
    assert payload.nbytes == sum(-(-f.nbytes // 16) * 16 for f in payload.fields)
    assert same_bytes(err, residual)
    assert int(nonfinite) == cleared == 0
    dense = gck.decompress(payload)
    assert same_bytes(dense, chunk_topk_reference.decompress(compressor, fields, 1000))
    assert torch.equal(gck.decompress_add_(dense.clone(), payload, -1.0), torch.zeros(1000))
    wanted, _, _ = chunk_topk_reference.compress(compressor, grad, torch.full((1000,), -0.0))
    assert all(same_bytes(a.flatten(), b) for a, b in zip(without.fields, wanted, strict=True))


@pytest.mark.parametrize(
    ("compressor", "nbytes"),
    [
        (gck.Quantize(8, 128), 1008 + 32),
        (gck.Quantize(4, 128, "stochastic", seed=11), 512 + 32),
        (gck.Quantize(2, 128, scale="mean"), 256 + 64),
    ],
    ids=str,
)
def test_quantize_ef(compressor: gck.Quantize, nbytes: int) -> None:
    grad, err = pair(1001, torch.bfloat16)
    options = (compressor.bits, 128, compressor.rounding, compressor.seed, compressor.scale)
    fields, residual, cleared = quantize_reference.compress(compressor, grad, err)
    without = gck.quantize(grad, *options)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    payload = gck.quantize_ef_(grad, err, *options, nonfinite=nonfinite)
    assert isinstance(payload, gck.Quantized)
    assert all(same_bytes(a.flatten(), b) for a, b in zip(payload.fields, fields, strict=True))
    assert payload.scales.shape == ((8, 2) if compressor.scale == "mean" else (8,))
    assert payload[2:] == (1001, 128, compressor.bits, compressor.scale)
    assert payload.nbytes == nbytes == compressor.layout(1001).nbytes
    assert same_bytes(err, residual)
    assert int(nonfinite) == cleared == 0
    dense = gck.decompress(payload)
    assert same_bytes(dense, quantize_reference.decompress(compressor, fields, 1001))
    assert same_bytes(gck.decompress([payload, payload]), dense + 0.0 + dense)
    wanted, _, _ = quantize_reference.compress(compressor, grad, torch.full((1001,), -0.0))
    assert all(same_bytes(a.flatten(), b) for a, b in zip(without.fields, wanted, strict=True))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_k_ef(value_dtype: torch.dtype) -> None:
    grad, err = pair(1001, torch.bfloat16)
    compressor = gck.RandomK(k=100, seed=-7, value_dtype=value_dtype)
    fields, residual, cleared = random_k_reference.compress(compressor, grad, err)
    options = {"seed": -7, "value_dtype": value_dtype}
    without = gck.random_k(grad, 0.0999, **options)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    payload = gck.random_k_ef_(grad, err, k=100, nonfinite=nonfinite, **options)
    assert isinstance(payload, gck.SeededValues)
    assert same_bytes(payload.values, fields[0])
    assert payload[1:] == (-7, 1001)
    assert payload.nbytes == 400 * value_dtype.itemsize // 4 + (0 if value_dtype == torch.float32 else 8)
    assert same_bytes(err, residual)
    assert int(nonfinite) == cleared == 0
    dense = gck.decompress(payload)
    assert same_bytes(dense, random_k_reference.decompress(compressor, fields, 1001))
    assert same_bytes(gck.decompress([payload, payload]), dense + 0.0 + dense)
    unbiased = Unbiased(k=100, seed=-7, value_dtype=value_dtype)
    wanted, _, _ = random_k_reference.compress(unbiased, grad, torch.full((1001,), -0.0))
    assert same_bytes(without.values, wanted[0])
    assert not torch.equal(without.values, fields[0])


@pytest.mark.parametrize(
    ("shape", "columns", "given"),
    [
        ((1001,), 32, None),  # about its square root
        ((13, 77), 77, None),
        ((7, 11, 13), 143, None),
        ((1001, 1), 1, None),
        ((1, 1001), 1001, None),
        ((13, 77), 50, 50),
        ((1001,), 1001, 5000),
    ],
    ids=str,
)
def test_low_rank_ef(shape: tuple[int, ...], columns: int, given: int | None) -> None:
    grad, err = pair(1001, torch.bfloat16)
    compressor = gck.LowRank(rank=3, columns=columns, seed=-7)
    (left, right), residual, cleared = low_rank_reference.compress(compressor, grad, err)
    without = gck.low_rank(grad.view(shape), 3, columns=given, seed=-7)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    payload = gck.low_rank_ef_(grad.view(shape), err, 3, columns=given, seed=-7, nonfinite=nonfinite)
    assert isinstance(payload, gck.LowRankFactors)
    rows, rank = -(-1001 // columns), min(3, columns, -(-1001 // columns))
    assert same_bytes(payload.left, left.view(rank, rows))
    assert same_bytes(payload.right, right.view(rank, columns))
    assert payload[2:] == (1001, columns)
    assert payload.compressor == "low_rank"
    assert payload.nbytes == sum(-(-f.nbytes // 16) * 16 for f in payload.fields)
    assert payload.nbytes == gck.LowRank(3, given).for_shape(shape).layout(1001).nbytes
    assert same_bytes(err, residual)
    assert int(nonfinite) == cleared == 0
    dense = gck.decompress(payload)
    assert same_bytes(dense, low_rank_reference.decompress(compressor, (left, right), 1001))
    assert same_bytes(gck.decompress([payload, payload]), dense + 0.0 + dense)
    wanted, _, _ = low_rank_reference.compress(compressor, grad, torch.full((1001,), -0.0))
    assert all(same_bytes(a.flatten(), b) for a, b in zip(without.fields, wanted, strict=True))


def test_low_rank_of_what_is_not_finite() -> None:
    """One entry spoils all rows and columns of what is sent, which the receiver sees; nothing of it stays."""
    for bad in (math.nan, math.inf, -math.inf):
        grad, err = pair()
        grad[500] = bad
        nonfinite = torch.zeros(1, dtype=torch.int64)
        payload = gck.low_rank_ef_(grad, err, 3, seed=1, nonfinite=nonfinite)
        spoilt = int((~gck.decompress(payload).isfinite()).sum())
        assert spoilt == int(nonfinite) >= 32
        assert bool(err.isfinite().all())
        assert int((err == 0).sum()) == spoilt


def test_low_rank_needs_another_seed_at_every_step() -> None:
    grad, _ = pair()
    payloads = [gck.low_rank(grad, 2, seed=seed) for seed in (3, 3, 4)]
    assert all(map(same_bytes, payloads[0].fields, payloads[1].fields))
    assert not torch.equal(payloads[0].left, payloads[2].left)


@pytest.mark.parametrize("n", [0, 1, 31])
def test_few_elements(n: int) -> None:
    grad, err = torch.ones(n), torch.ones(n)
    payload = gck.topk_ef_(grad, err, 0.5)
    assert payload.values.numel() == -(-n // 2)
    assert gck.decompress(payload).shape == (n,)
    signs = gck.sign_ef_(grad, err)
    assert signs.words.numel() == -(-n // 32)
    assert gck.decompress(signs).shape == (n,)
    assert gck.topk(grad, k=1).values.numel() == min(n, 1)
    chunks = gck.chunk_topk(grad, 32, 16, value_bits=32)
    assert chunks.indices.shape == (-(-n // 32), 16)
    assert int(gck.decompress(chunks).count_nonzero()) == min(n, 16)
    codes = gck.quantize_ef_(grad, err)
    assert codes.codes.numel() == -(-n // 2)
    seeded = gck.random_k_ef_(grad, err, 0.5, seed=n)
    assert seeded.values.numel() == -(-n // 2)
    assert gck.decompress(seeded).shape == gck.decompress(gck.random_k(grad, k=1, seed=0)).shape == (n,)
    factors = gck.low_rank_ef_(grad, err, 2, seed=n)
    assert factors.left.shape == (min(n, 2), {0: 0, 1: 1, 31: 6}[n])
    assert factors.right.shape == (min(n, 2), factors.columns) == (min(n, 2), {0: 0, 1: 1, 31: 6}[n])
    for tensor in (torch.ones(n, 1), torch.ones(1, n), torch.ones(n, 0), torch.ones(0, n)):
        assert gck.decompress(gck.low_rank(tensor, 64, seed=0)).shape == (tensor.numel(),)
    assert (
        gck.decompress(factors).shape == gck.decompress(gck.low_rank(grad, columns=5, seed=0)).shape == (n,)
    )
    assert gck.decompress(codes).shape == gck.decompress(gck.quantize(grad, 2, scale="mean")).shape == (n,)


def test_error_feedback_loses_nothing() -> None:
    """What was sent and what is kept add up to the gradients, step after step."""
    torch.manual_seed(0)
    grads = torch.randn(20, 5000, dtype=torch.float64).float()
    for compress in (
        lambda g, e: gck.topk_ef_(g, e, 0.02),
        lambda g, e: gck.sign_ef_(g, e, 128),
        lambda g, e: gck.chunk_topk_ef_(g, e, 128, 8, value_bits=2),
        lambda g, e: gck.quantize_ef_(g, e, 2, 128),
        lambda g, e: gck.random_k_ef_(g, e, 0.1, seed=int(g[0] * 1e6)),
        lambda g, e: gck.low_rank_ef_(g, e, 4, seed=int(g[0] * 1e6)),
    ):
        err, sent = torch.zeros(5000), torch.zeros(5000, dtype=torch.float64)
        for grad in grads:
            sent += gck.decompress(compress(grad, err)).double()
        total = grads.double().sum(0)
        assert torch.allclose(sent + err.double(), total, atol=1e-4)
        assert not torch.allclose(sent, total, atol=1e-1)


class TestDecompress:
    def test_into_out(self) -> None:
        payload = gck.topk(torch.tensor([1.0, -5.0, 0.5, 3.0]), k=2)
        out = torch.full((2, 2), math.nan)
        assert gck.decompress(payload, out=out) is out
        assert torch.equal(out, torch.tensor([[0.0, -5.0], [0.0, 3.0]]))

    def test_add(self) -> None:
        payload = gck.topk(torch.tensor([1.0, -5.0, 0.5, 3.0]), k=2)
        out = torch.ones(4)
        assert gck.decompress_add_(out, payload, alpha=0.5) is out
        assert torch.equal(out, torch.tensor([1.0, -1.5, 1.0, 2.5]))

    def test_payload_made_by_hand(self) -> None:
        payload = gck.SparseGrad(torch.tensor([2.0, 3.0]), torch.tensor([1, 4]), 6)
        assert torch.equal(gck.decompress(payload), torch.tensor([0.0, 2, 0, 0, 3, 0]))
        assert payload.nbytes == 32
        packed = body_of(*payload.fields)
        assert packed.numel() == 32
        assert torch.equal(packed[16:32].view(torch.int64), payload.indices)

    def test_padding_is_zero(self) -> None:
        grad, err = pair(1001)
        for payload in (
            gck.topk_ef_(grad, err, k=7, value_dtype=torch.bfloat16),
            gck.sign_ef_(grad, err),
            gck.chunk_topk_ef_(grad, err, 64, 5, value_bits=4),
            gck.chunk_topk_ef_(grad, err, 64, 5, value_bits=32),
            gck.quantize_ef_(grad, err, 4, 32),
            gck.quantize_ef_(grad, err, 2, 32, scale="mean"),
            gck.random_k_ef_(grad, err, k=7, seed=1, value_dtype=torch.float16),
            gck.low_rank_ef_(grad, err, 3, columns=65, seed=1),
        ):
            body = body_of(*payload.fields)
            again = body_of(*(field.clone() for field in payload.fields))
            assert torch.equal(body, again)

    def test_body_is_not_copied(self) -> None:
        payload = gck.topk_ef_(*pair(), 0.01)
        body = body_of(*payload.fields)
        assert body.data_ptr() == payload.values.data_ptr()
        assert body.numel() == payload.nbytes

    @pytest.mark.parametrize(
        "indices",
        [[0, 0], [3, 2], [-1, 2], [0, 6], [2**40, 2**41]],
        ids=["twice", "order", "low", "high", "far"],
    )
    def test_bad_indices_change_nothing(self, indices: list[int]) -> None:
        payload = gck.SparseGrad(torch.ones(2), torch.tensor(indices), 6)
        out = torch.arange(6.0)
        for call in (gck.decompress_add_, lambda o, p: gck.decompress(p, out=o)):
            with pytest.raises(CorruptPayloadError, match=r"indices must ascend within \[0, 6\)"):
                call(out, payload)
        assert torch.equal(out, torch.arange(6.0))

    def test_bad_payloads(self) -> None:
        out = torch.zeros(64)
        short = gck.PackedSigns(torch.zeros(1, dtype=torch.uint32), torch.ones(2), 64, 32)
        with pytest.raises(CorruptPayloadError, match="does not fit 64 elements"):
            gck.decompress(short, out=out)
        uneven = gck.SparseGrad(torch.ones(2), torch.tensor([1]), 64)
        with pytest.raises(CorruptPayloadError, match=r"2,.* values and .*1,.* indices"):
            gck.decompress(uneven, out=out)
        with pytest.raises(DtypeError, match="must hold"):
            gck.decompress(gck.SparseGrad(torch.ones(1).double(), torch.tensor([1]), 64), out=out)
        chunks = gck.chunk_topk(torch.ones(64), 32, 4, value_bits=4)
        for wrong in (
            chunks._replace(values=chunks.values[:1]),
            chunks._replace(scales=chunks.scales[:1]),
            chunks._replace(indices=chunks.indices[:1]),
            chunks._replace(chunk_size=2**5, k=5),
        ):
            with pytest.raises(CorruptPayloadError, match="does not fit 64 elements in chunks of 32"):
                gck.decompress(wrong, out=out)
        for wrong in (chunks._replace(values=chunks.values.view(torch.int8)), chunks._replace(value_bits=16)):
            with pytest.raises(DtypeError, match="must hold values, scales and indices"):
                gck.decompress(wrong, out=out)
        with pytest.raises(
            ArgumentError, match=r"decompress: k must be in \[1, chunk_size / 2 = 16\], got 17"
        ):
            gck.decompress(chunks._replace(k=17), out=out)
        codes = gck.quantize(torch.ones(64), 4, 32)
        for wrong in (codes._replace(codes=codes.codes[:31]), codes._replace(scales=codes.scales[:1])):
            with pytest.raises(CorruptPayloadError, match="does not fit 64 elements"):
                gck.decompress(wrong, out=out)
        with pytest.raises(ArgumentError, match='decompress: scale "mean" needs 2 bits, got 4'):
            gck.decompress(codes._replace(scale="mean"), out=out)
        seeded = gck.random_k(torch.ones(64), k=4, seed=1)
        for values in (torch.ones(65), torch.ones(0), torch.ones(2, 2)):
            with pytest.raises(CorruptPayloadError, match="values does not fit 64 elements"):
                gck.decompress(seeded._replace(values=values), out=out)
        with pytest.raises(ArgumentError, match=r"decompress: seed must be in .* got 9223372036854775808"):
            gck.decompress(seeded._replace(seed=2**63), out=out)
        with pytest.raises(DtypeError, match="must hold float32, bfloat16 or float16 values, got"):
            gck.decompress(seeded._replace(values=torch.ones(4, dtype=torch.uint8)), out=out)
        with pytest.raises(ShapeMismatchError, match="kind, options and size of payload 0"):
            gck.decompress([seeded, seeded._replace(seed=2)], out=out)
        factors = gck.low_rank(torch.ones(64), 2, seed=1)
        for wrong in (
            factors._replace(left=factors.left.view(-1)),
            factors._replace(right=factors.right.view(-1)),
            factors._replace(left=torch.ones(())),
            factors._replace(left=torch.ones(1, 2, 8)),
            factors._replace(left=factors.left[:1]),
            factors._replace(left=torch.ones(2, 7)),
            factors._replace(right=torch.ones(2, 9)),
            factors._replace(left=torch.ones(0, 8), right=torch.ones(0, 8)),
            factors._replace(left=torch.ones(9, 8), right=torch.ones(9, 8)),
            factors._replace(columns=7),
            factors._replace(columns=9),
            factors._replace(columns=65),
            factors._replace(columns=2**31 - 1),
            gck.LowRankFactors(torch.ones(65, 70), torch.ones(65, 70), 4900, 70),
            factors._replace(numel=56),
            factors._replace(numel=65),
            factors._replace(numel=0),
            factors._replace(numel=0, columns=0),
            gck.LowRankFactors(torch.ones(0, 0), torch.ones(0, 0), 0, 1),
        ):
            for given in (wrong, [wrong, wrong], [factors, wrong]):
                for call in (gck.decompress, lambda p: gck.decompress_add_(out, p, [1.0, 2.0])):
                    if call is gck.decompress or isinstance(given, list):
                        with pytest.raises(CorruptPayloadError, match=r"payload (left|right) of .* not fit"):
                            call(given)
        for columns, error in (
            (0, ArgumentError),
            (-8, ArgumentError),
            (2**31, ArgumentError),
            (True, DtypeError),
            (8.0, DtypeError),
            (None, DtypeError),
            (torch.tensor(8), DtypeError),
        ):
            with pytest.raises(error, match=r"decompress: columns must be .* got"):
                gck.decompress(factors._replace(columns=columns), out=out)  # type: ignore[arg-type]
        with pytest.raises(DtypeError, match=r"payload left must be float32, got torch\.float16"):
            gck.decompress(factors._replace(left=factors.left.half()), out=out)
        with pytest.raises(DtypeError, match=r"payload right must be float32, got torch\.int32"):
            gck.decompress([factors, factors._replace(right=factors.right.int())], out=out)
        with pytest.raises(ShapeMismatchError, match="kind, options and size of payload 0"):
            gck.decompress([factors, gck.low_rank(torch.ones(64), 2, columns=9, seed=1)], out=out)
        with pytest.raises(ArgumentError, match="power of two"):
            gck.decompress(gck.PackedSigns(torch.zeros(2, dtype=torch.uint32), torch.ones(2), 64, 33), out)
        for field in (torch.zeros(2), [0.0, 0.0], np.zeros(2, dtype=np.float32)):
            with pytest.raises(DtypeError):
                gck.decompress(gck.SparseGrad(torch.ones(2), field, 64), out=out)  # type: ignore[arg-type]
        with pytest.raises(AutogradError, match="payload field 0 requires grad"):
            gck.decompress(gck.SparseGrad(torch.ones(1, requires_grad=True), torch.tensor([1]), 64), out)
        for numel, error in ((-1, ArgumentError), (2.5, DtypeError), (True, DtypeError)):
            with pytest.raises(error, match=r"payload\.numel must be"):
                gck.decompress(gck.SparseGrad(torch.ones(1), torch.tensor([1]), numel))  # type: ignore[arg-type]
        with pytest.raises(DtypeError, match="chunk_size must be an int, got None"):
            gck.decompress(gck.PackedSigns(torch.zeros(2, dtype=torch.uint32), torch.ones(2), 64, None))  # type: ignore[arg-type]
        assert not out.any()

    def test_out_does_not_fit(self) -> None:
        payload = gck.sign_ef_(*pair())
        for wrong in (torch.zeros(999), torch.zeros(1001)):
            with pytest.raises(
                ShapeMismatchError, match=f"out has {wrong.numel()} elements, the payload is of 1000"
            ):
                gck.decompress(payload, out=wrong)
        with pytest.raises(DtypeError, match="float32"):
            gck.decompress(payload, out=torch.zeros(1000, dtype=torch.bfloat16))
        with pytest.raises(LayoutError, match="contiguous"):
            gck.decompress_add_(torch.zeros(2000)[::2], payload)
        with pytest.raises(ArgumentError, match="alpha must be a finite number of fp32, got nan"):
            gck.decompress_add_(torch.zeros(1000), payload, alpha=math.nan)
        for alpha in (1e39, -1e39, 10**400):  # infinite as fp32
            with pytest.raises(ArgumentError, match=r"alpha must be a finite number of fp32, got -?1"):
                gck.decompress_add_(torch.zeros(1000), payload, alpha=alpha)
        with pytest.raises(DtypeError, match=r"payload must be a payload of gck, got 3 \(int\)"):
            gck.decompress(3)  # type: ignore[arg-type]


def test_a_compressor_can_be_subclassed() -> None:
    class Mine(gck.Sign):
        """A user's own compressor, in a module of theirs."""

    grad, err = pair()
    bodies = torch.zeros(2, 1, gck.Sign().layout(1000).nbytes, dtype=torch.uint8)
    Mine().compress_(grad, err.clone(), bodies[0])
    gck.Sign().compress_(grad, err, bodies[1])
    assert torch.equal(bodies[0], bodies[1])
