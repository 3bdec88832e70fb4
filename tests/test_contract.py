"""The contract of a compressor, checked on every compressor in the registry and every backend.

The oracle is the compressor's `reference`; results are compared by their bytes.
"""

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
from gck.coded_layout import INDEX_CODECS
from gck.compressor import REGISTRY, shard_numel
from gck.kernels.reference import read_residual
from tests.cases import CASES, GRAD_DTYPES, Guarded, make, one_nan, same_bytes

VARIANTS: dict[str, list[Any]] = {
    "topk": [
        gck.TopK(ratio=0.01),
        gck.TopK(ratio=0.1, value_dtype=torch.bfloat16),
        gck.TopK(ratio=0.3, value_dtype=torch.bfloat16),
        gck.TopK(k=1, value_dtype=torch.float16),
        gck.TopK(ratio=1.0),
        gck.TopK(ratio=0.01, index_codec="elias_fano", value_bits=16),
        gck.TopK(ratio=0.3, index_codec="block16", value_bits=4),
    ],
    "sign": [gck.Sign(chunk_size=32), gck.Sign(), gck.Sign(chunk_size=8192)],
    "chunk_topk": [
        gck.ChunkTopK(),
        gck.ChunkTopK(value_bits=2),
        gck.ChunkTopK(k=5, chunk_size=32, value_bits=4),
        gck.ChunkTopK(k=16, chunk_size=32, value_bits=8, index_bits=16),
        gck.ChunkTopK(k=7, chunk_size=128, value_bits=2),
        gck.ChunkTopK(k=1, chunk_size=256, value_bits=32),
        gck.ChunkTopK(k=333, chunk_size=1024, value_bits=8),
        gck.ChunkTopK(k=1000, chunk_size=65536, value_bits=32),
    ],
    "quantize": [
        gck.Quantize(8),
        gck.Quantize(4, 64, "stochastic", seed=-3),
        gck.Quantize(2),
        gck.Quantize(2, 8192, scale="mean"),
    ],
    "random_k": [
        gck.RandomK(ratio=0.01),
        gck.RandomK(ratio=0.1, seed=-3, value_dtype=torch.bfloat16),
        gck.RandomK(k=1, seed=2**40, value_dtype=torch.float16),
        gck.RandomK(ratio=0.7, seed=9),
        gck.RandomK(ratio=1.0, seed=1),
    ],
}
COMPRESSORS = [c for variants in VARIANTS.values() for c in variants]

# One, a few, around a word, an odd one over several tiles; and, compiled only, one that is large
# enough for the sampled top-k and several threads.
SMALL = [1, 2, 33, 2049]
LARGE = [70_001]


def _backend(name: str, compressor: Any) -> tuple[Any, str]:
    package = type(compressor).__module__
    if name == "cpu":
        return import_module(f"{package}.cpu"), "cpu"
    device = "cuda" if name == "cuda" else "cpu"
    if name == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module(f"{package}.gpu"), device


BACKENDS = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def _reference(compressor: Any) -> Any:
    return import_module(f"{type(compressor).__module__}.reference")


def check_case(compressor: Any, backend: str, grad: Tensor, err: Tensor, shards: int = 1) -> None:
    """Compress and decode between canaries, and compare every byte with the reference."""
    kernels, device = _backend(backend, compressor)
    reference = _reference(compressor)
    n = grad.numel()
    fields, new_err, cleared = reference.compress(compressor, grad, err)
    dense = reference.decompress(compressor, fields, n)

    g, e = Guarded.of(grad.to(device)), Guarded.of(err.to(device))
    shard = shard_numel(n, compressor.shard_unit, shards)
    layout = compressor.layout(shard)
    memory = torch.full((shards, layout.nbytes + 48), 0xA5, dtype=torch.uint8, device=device)
    bodies = memory[:, 16 : 16 + layout.nbytes]
    bodies.zero_()
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    # Kernels find a clip on the device, where `KernelCompressor.run` puts it.
    options = {} if compressor.clip is None else {"clip": torch.tensor([compressor.clip], device=device)}
    kernels.compress_(compressor, g.inner, e.inner, bodies, nonfinite, **options)

    assert same_bytes(g.inner, grad)
    assert same_bytes(e.inner, new_err)
    assert int(nonfinite) == 5 + cleared
    assert g.intact()
    assert e.intact()
    assert (memory[:, :16] == 0xA5).all()
    assert (memory[:, 16 + layout.nbytes :] == 0xA5).all()
    for s in range(shards):
        part = slice(min(n, s * shard), min(n, (s + 1) * shard))
        got = layout.views(bodies[s])
        if part.start < part.stop:
            wanted = fields if shards == 1 else part_of(compressor, fields, part)
            for g_field, w_field in zip(got, wanted, strict=True):
                assert same_bytes(g_field[: w_field.numel()], w_field)
                assert not g_field[w_field.numel() :].view(torch.uint8).any()
        else:
            assert not bodies[s].any()
        out = Guarded.of(torch.full((part.stop - part.start,), torch.nan, device=device))
        if out.inner.numel():
            kernels.decompress_(compressor, out.inner, got, 1.0, False)
            assert same_bytes(one_nan(out.inner), one_nan(dense[part]).to(device))
            assert out.intact()
            base = torch.linspace(-2, 3, out.inner.numel(), device=device)
            out.inner.copy_(base)
            kernels.decompress_(compressor, out.inner, got, 0.7, True)
            alpha = torch.tensor(0.7)
            reached = reached_by(compressor, fields, n)
            wanted_sum = base.cpu().clone()
            wanted_sum[reached] = wanted_sum[reached] + (alpha * dense[part])[reached]
            assert same_bytes(one_nan(out.inner), one_nan(wanted_sum).to(device))
            assert out.intact()

    # What the reference itself must satisfy, said once more without it.
    acc = grad.float() + read_residual(compressor, err)
    residual = acc - dense
    assert same_bytes(new_err, torch.where(residual.isfinite(), residual, 0.0))
    assert bool(acc.isfinite().all()) or not bool(dense.isfinite().all())


def reached_by(compressor: Any, fields: tuple[Tensor, ...], n: int) -> Any:
    """The elements that decoding adds something to; to others, not even a zero."""
    if compressor.name == "topk":
        return _reference(compressor).indices_of(compressor, fields, n)
    if compressor.name == "random_k":
        return torch.tensor(_reference(compressor).indices(compressor.seed, n, fields[0].numel()))
    return slice(None)


def part_of(compressor: Any, fields: tuple[Tensor, ...], part: slice) -> list[Tensor]:
    """The fields of a shard: those of its chunks in the whole vector, and nothing else."""
    unit = compressor.shard_unit
    chunks = slice(part.start // unit, -(-part.stop // unit))
    counts = [field.count for field in compressor.layout(unit).fields]
    return [f[chunks.start * c : chunks.stop * c] for f, c in zip(fields, counts, strict=True)]


def test_every_compressor_is_tested() -> None:
    assert set(VARIANTS) == set(REGISTRY)
    assert all(type(c).name == name for name, variants in VARIANTS.items() for c in variants)


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_cpu(compressor: Any, case: str, dtype: torch.dtype) -> None:
    for n in SMALL + (LARGE if dtype == torch.float32 else []):
        check_case(compressor, "cpu", *make(case, n, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_cuda(compressor: Any, case: str, dtype: torch.dtype) -> None:
    for n in SMALL + LARGE:
        check_case(compressor, "cuda", *make(case, n, dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_interpreter(compressor: Any, case: str) -> None:
    # The interpreter is slow: dtypes and sizes take turns over the cases.
    turn = list(CASES).index(case)
    for i, n in enumerate((1, 33, 2049)):
        check_case(compressor, "interpreter", *make(case, n, GRAD_DTYPES[(turn + i) % 3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.shard_unit], ids=str)
def test_shards(compressor: Any, shards: int, backend: str) -> None:
    sizes = (1, 100, 5000) if backend == "interpreter" else (1, 100, 5000, 70_001)
    for n in sizes:
        check_case(compressor, backend, *make("few nonfinite", n, torch.float32), shards=shards)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_thread_count_changes_nothing(compressor: Any) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            check_case(compressor, "cpu", *make("ties", 300_007, torch.bfloat16))
            check_case(compressor, "cpu", *make("gaussian", 300_007, torch.float32))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_denormals_survive_flush_to_zero(compressor: Any) -> None:
    grad, err = make("denormal", 70_001, torch.float32)
    wanted = _reference(compressor).compress(compressor, grad, err)
    body = torch.zeros(1, compressor.layout(70_001).nbytes, dtype=torch.uint8)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        compressor.compress_(grad, err, body)
    finally:
        torch.set_flush_denormal(False)
    assert same_bytes(err, wanted[1])
    for got, field in zip(compressor.layout(70_001).views(body[0]), wanted[0], strict=True):
        assert same_bytes(got, field)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_nans_of_any_bits(compressor: Any) -> None:
    """The largest key of all among them, and signalling ones."""
    patterns = torch.tensor([0x7FFFFFFF, -1, -0x400000, 0x7F800001], dtype=torch.int32)
    grad, err = make("gaussian", 300, torch.float32)
    for nans in (patterns[:1], patterns[1:2], patterns):
        for places in (slice(0, len(nans)), slice(None, len(grad) // len(nans) * len(nans))):
            spoilt = grad.clone()
            spoilt[places] = nans.view(torch.float32).repeat(len(spoilt[places]) // len(nans))
            check_case(compressor, "cpu", spoilt, err)
            check_case(compressor, "cpu", spoilt, torch.full_like(err, -0.0))


# Few distinct values make ties; the special ones make trouble.
VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-40, 3e38, float("inf"), float("nan"), 65520.0]
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), values=st.lists(VALUES, min_size=1, max_size=200))
def test_any_values(data: st.DataObject, values: list[float]) -> None:
    grad = torch.tensor(values)
    err = torch.tensor(data.draw(st.lists(VALUES, min_size=len(values), max_size=len(values))))
    dtype = data.draw(st.sampled_from(GRAD_DTYPES))
    compressor = data.draw(
        st.one_of(
            st.builds(
                gck.TopK,
                k=st.integers(1, len(values)),
                value_dtype=st.sampled_from(GRAD_DTYPES),
                index_codec=st.sampled_from(INDEX_CODECS),
            ),
            st.builds(
                gck.TopK,
                k=st.integers(1, len(values)),
                index_codec=st.sampled_from(INDEX_CODECS),
                value_bits=st.sampled_from([8, 4]),
            ),
            st.builds(
                gck.RandomK,
                k=st.integers(1, len(values)),
                seed=st.integers(-(2**63), 2**63 - 1),
                value_dtype=st.sampled_from(GRAD_DTYPES),
            ),
            st.builds(gck.Sign, st.sampled_from([32, 64, 128])),
            st.builds(
                gck.Quantize,
                st.sampled_from([8, 4, 2]),
                st.sampled_from([32, 64, 128]),
                st.sampled_from(["nearest", "stochastic"]),
                st.integers(-(2**63), 2**63 - 1),
            ),
            st.builds(gck.Quantize, st.just(2), st.sampled_from([32, 64, 128]), scale=st.just("mean")),
            st.builds(
                gck.ChunkTopK,
                k=st.integers(1, 16),
                chunk_size=st.sampled_from([32, 64, 128]),
                value_bits=st.sampled_from([32, 16, 8, 4, 2]),
                index_bits=st.sampled_from([12, 16]),
            ),
        )
    )
    check_case(compressor, "cpu", grad.to(dtype), err)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_empty(compressor: Any) -> None:
    layout = compressor.layout(0)
    assert layout.nbytes == 0
    body = torch.zeros(1, 0, dtype=torch.uint8)
    compressor.compress_(torch.empty(0), torch.empty(0), body)
    compressor.decompress_(torch.empty(0), body[0])


# Not of random-k, which without a residual is another: unbiased.
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.name != "random_k"], ids=str)
def test_without_residual_is_the_same_as_a_residual_of_nothing(compressor: Any) -> None:
    grad, _ = make("ties", 5000, torch.float32)
    grad[grad == 0] = -0.0
    bodies = torch.zeros(2, 1, compressor.layout(5000).nbytes, dtype=torch.uint8)
    compressor.compress_(grad, None, bodies[0])
    compressor.compress_(grad, torch.full((5000,), -0.0), bodies[1])
    assert torch.equal(bodies[0], bodies[1])


GOOD = {"grad": torch.ones(300), "err": torch.ones(300)}
BAD: dict[str, tuple[type[Exception], Callable[[], dict[str, Any]]]] = {
    "err is no tensor": (gck.errors.DtypeError, lambda: {"err": [0.0] * 300}),
    "err dtype": (gck.errors.DtypeError, lambda: {"err": torch.ones(300, dtype=torch.float64)}),
    "err half": (gck.errors.DtypeError, lambda: {"err": torch.ones(300, dtype=torch.bfloat16)}),
    "numel": (gck.errors.ShapeMismatchError, lambda: {"err": torch.ones(299)}),
    "device": (gck.errors.DeviceMismatchError, lambda: {"err": torch.ones(300, device="meta")}),
    "no kernel": (
        gck.errors.DeviceMismatchError,
        lambda: {"grad": torch.ones(300, device="meta"), "err": torch.ones(300, device="meta")},
    ),
    "grad strided": (gck.errors.LayoutError, lambda: {"grad": torch.ones(600)[::2]}),
    "err strided": (gck.errors.LayoutError, lambda: {"err": torch.ones(600)[::2]}),
    "grad sparse": (gck.errors.LayoutError, lambda: {"grad": torch.ones(300).to_sparse()}),
    "integer grad": (gck.errors.DtypeError, lambda: {"grad": torch.ones(300, dtype=torch.int32)}),
    "complex grad": (gck.errors.DtypeError, lambda: {"grad": torch.ones(300, dtype=torch.complex64)}),
    "double grad": (gck.errors.DtypeError, lambda: {"grad": torch.ones(300, dtype=torch.float64)}),
    "grad requires grad": (gck.errors.AutogradError, lambda: {"grad": torch.ones(300, requires_grad=True)}),
    "err requires grad": (gck.errors.AutogradError, lambda: {"err": torch.ones(300, requires_grad=True)}),
    "nonfinite dtype": (gck.errors.DtypeError, lambda: {"nonfinite": torch.zeros(1)}),
    "nonfinite size": (
        gck.errors.ShapeMismatchError,
        lambda: {"nonfinite": torch.zeros(2, dtype=torch.int64)},
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_bad_input_changes_nothing(compressor: Any, bad: str) -> None:
    error, make_bad = BAD[bad]
    arguments = {name: value.clone() for name, value in GOOD.items()} | make_bad()
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [t.detach().clone() for t in tensors]
    body = torch.zeros(1, compressor.layout(300).nbytes, dtype=torch.uint8)
    with pytest.raises(error, match=r"^\w+\.compress_: .*(got|requires|overlap)"):
        compressor.compress_(arguments.pop("grad"), arguments.pop("err"), body, **arguments)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(
            tensor.detach().to_dense() if tensor.is_sparse else tensor.detach(), old.to_dense()
        )
    assert not body.any()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_overlap_changes_nothing(compressor: Any) -> None:
    memory = torch.arange(500.0)
    body = torch.zeros(1, compressor.layout(300).nbytes, dtype=torch.uint8)
    for grad, err in ((memory[:300], memory[200:]), (memory[:300], memory[:300])):
        with pytest.raises(gck.errors.LayoutError, match=r"(grad and err|err and grad) overlap"):
            compressor.compress_(grad, err, body)
    assert torch.equal(memory, torch.arange(500.0))
    assert not body.any()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_wrong_body(compressor: Any) -> None:
    err = torch.ones(300)
    nbytes = compressor.layout(300).nbytes
    for body in (torch.zeros(1, nbytes + 16, dtype=torch.uint8), torch.zeros(1, nbytes, dtype=torch.int8)):
        with pytest.raises(gck.errors.ShapeMismatchError, match="bodies must be"):
            compressor.compress_(torch.ones(300), err, body)
    wide = torch.zeros(2, 4 * nbytes, dtype=torch.uint8)
    rows = {
        "one byte": torch.zeros(1, 1, dtype=torch.uint8).expand(1, nbytes),
        "unaligned": wide[:1, 8 : 8 + nbytes],
        "every other": wide[:1, : 2 * nbytes : 2],
    }
    for bad in rows.values():
        with pytest.raises(gck.errors.LayoutError, match="rows of bodies must be contiguous"):
            compressor.compress_(torch.ones(300), err, bad)
    for nothing in (torch.zeros(0, nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)):
        with pytest.raises(gck.errors.ShapeMismatchError, match="at least one row"):
            compressor.compress_(torch.ones(300), err, nothing)
    with pytest.raises(gck.errors.DtypeError, match="bodies must be a tensor, got list"):
        compressor.compress_(torch.ones(300), err, [0] * nbytes)
    body = torch.zeros(1, nbytes, dtype=torch.uint8)
    with pytest.raises(gck.errors.LayoutError, match="overlap"):
        compressor.compress_(torch.ones(300), err, body, nonfinite=err[:2].view(torch.int64))
    assert torch.equal(err, torch.ones(300))
    with pytest.raises(gck.errors.CorruptPayloadError, match=f"expected {nbytes} bytes"):
        compressor.decompress_(torch.ones(300), torch.zeros(nbytes + 1, dtype=torch.uint8))


def test_a_counter_of_inference_mode_changes_nothing() -> None:
    with torch.inference_mode():
        nonfinite = torch.zeros(1, dtype=torch.int64)
    err = torch.ones(300)
    for call in (
        lambda: gck.topk_ef_(err * 2, err, k=3, nonfinite=nonfinite),
        lambda: gck.sign_ef_(err * 2, err, nonfinite=nonfinite),
    ):
        with pytest.raises(gck.errors.AutogradError, match="nonfinite was made in inference mode"):
            call()
    assert torch.equal(err, torch.ones(300))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_compressor_is_a_value(compressor: Any) -> None:
    assert isinstance(compressor, gck.Compressor)
    assert hash(compressor) == hash(eval(repr(compressor), {"torch": torch, **vars(gck)}))
    assert compressor.layout(12345).nbytes % 16 == 0
