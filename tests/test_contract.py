"""The contract of a compressor, checked on every compressor in the registry and every backend.

The oracle is the compressor's `reference`; results are compared by their bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gck
from gck.coded_layout import INDEX_CODECS
from gck.compressor import REGISTRY
from tests.cases import CASES, GRAD_DTYPES, make, same_bytes
from tests.contract import COMPRESSORS, VARIANTS, check_case, reference_of

# One, a few, around a word, an odd one over several tiles; and, compiled only, one that is large
# enough for the sampled top-k and several threads.
SMALL = [1, 2, 33, 2049]
LARGE = [70_001]


BACKENDS = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


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
    wanted = reference_of(compressor).compress(compressor, grad, err)
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
            st.builds(
                gck.LowRank,
                rank=st.integers(1, 64),
                columns=st.one_of(st.none(), st.integers(1, 250)),
                seed=st.integers(-(2**63), 2**63 - 1),
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


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_compressor_is_a_value(compressor: Any) -> None:
    assert isinstance(compressor, gck.Compressor)
    assert hash(compressor) == hash(eval(repr(compressor), {"torch": torch, **vars(gck)}))
    assert compressor.layout(12345).nbytes % 16 == 0
