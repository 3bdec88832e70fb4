"""Wrong options and tensors, to the functional API: typed errors, and nothing changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gck
from gck.errors import (
    ArgumentError,
    AutogradError,
    DtypeError,
    LayoutError,
)
from tests.ops_calls import FUNCTIONS, pair

TOPK_BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ratio 0": (ArgumentError, r"topk_ef_: ratio must be in \(0, 1\], got 0", {"ratio": 0}),
    "ratio low": (ArgumentError, r"ratio must be in \(0, 1\], got -0.5", {"ratio": -0.5}),
    "ratio high": (ArgumentError, r"topk_ef_: ratio must be in \(0, 1\], got 1.5", {"ratio": 1.5}),
    "ratio nan": (ArgumentError, r"ratio must be in \(0, 1\], got nan", {"ratio": math.nan}),
    "ratio text": (DtypeError, r"ratio must be a number, got '0.1' \(str\)", {"ratio": "0.1"}),
    "k 0": (ArgumentError, "k must be at least 1, got 0", {"k": 0}),
    "k low": (ArgumentError, "k must be at least 1, got -3", {"k": -3}),
    "k high": (ArgumentError, "k must be at most the number of elements 1000, got 1001", {"k": 1001}),
    "k float": (DtypeError, r"k must be an int, got 2.0 \(float\)", {"k": 2.0}),
    "both": (ArgumentError, "exactly one of ratio and k", {"ratio": 0.1, "k": 3}),
    "neither": (ArgumentError, "exactly one of ratio and k", {}),
    "value_dtype": (DtypeError, "value_dtype must be", {"ratio": 0.1, "value_dtype": torch.int8}),
}


@pytest.mark.parametrize("bad", TOPK_BAD)
def test_topk_bad_options_change_nothing(bad: str) -> None:
    error, text, options = TOPK_BAD[bad]
    grad, err = pair()
    before = grad.clone(), err.clone()
    with pytest.raises(error, match=text):
        gck.topk_ef_(grad, err, **options)
    assert torch.equal(grad, before[0])
    assert torch.equal(err, before[1])


@pytest.mark.parametrize("chunk_size", [0, -32, 16, 16384, 48, 100, 64.0, True])
def test_sign_bad_chunk_size_changes_nothing(chunk_size: Any) -> None:
    grad, err = pair()
    before = err.clone()
    with pytest.raises(ArgumentError, match="sign_ef_: chunk_size must be"):
        gck.sign_ef_(grad, err, chunk_size)
    assert torch.equal(err, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 4000}, r"chunk_topk_ef_: k must be in \[1, chunk_size / 2 = 2048\], got 4000"),
        ({"chunk_size": 48}, r"chunk_topk_ef_: chunk_size must be a power of two in \[32, 65536\], got 48"),
        ({"value_bits": 3}, "chunk_topk_ef_: value_bits must be one of 32, 16, 8, 4, 2, got 3"),
        ({"k": 8.0}, r"chunk_topk_ef_: k must be an int, got 8.0 \(float\)"),
    ],
    ids=["k", "chunk_size", "value_bits", "type"],
)
def test_chunk_topk_bad_options_change_nothing(options: dict[str, Any], text: str) -> None:
    grad, err = pair()
    before = err.clone()
    with pytest.raises(ArgumentError, match=text):
        gck.chunk_topk_ef_(grad, err, **options)
    with pytest.raises(ArgumentError, match=text.replace("_ef_", "")):
        gck.chunk_topk(grad, **options)
    assert torch.equal(err, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 3}, "quantize_ef_: bits must be one of 8, 4, 2, got 3"),
        ({"chunk_size": 48}, r"quantize_ef_: chunk_size must be a power of two in \[32, 8192\], got 48"),
        ({"rounding": "up"}, 'quantize_ef_: rounding must be "nearest" or "stochastic", got \'up\''),
        ({"seed": 2**63}, r"quantize_ef_: seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"seed": "1"}, r"quantize_ef_: seed must be an int, got '1' \(str\)"),
        ({"rounding": "stochastic"}, r"quantize_ef_: Quantize\(.*\) has no seed, .* such as seed=step"),
        ({"scale": "mean"}, 'quantize_ef_: scale "mean" needs 2 bits, got 4'),
    ],
    ids=["bits", "chunk_size", "rounding", "seed", "type", "none", "scale"],
)
def test_quantize_bad_options_change_nothing(options: dict[str, Any], text: str) -> None:
    grad, err = pair()
    before = err.clone()
    with pytest.raises(ArgumentError, match=text):
        gck.quantize_ef_(grad, err, **options)
    with pytest.raises(ArgumentError, match=text.replace("_ef_", "")):
        gck.quantize(grad, **options)
    assert torch.equal(err, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "random_k_ef_: exactly one of ratio and k must be given, got ratio=None and k=None"),
        ({"ratio": 1.5}, r"random_k_ef_: ratio must be in \(0, 1\], got 1.5"),
        ({"k": 1001}, "random_k_ef_: k must be at most the number of elements 1000, got 1001"),
        (
            {"k": 5, "seed": 2**63},
            r"random_k_ef_: seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808",
        ),
        ({"k": 5, "seed": 1.0}, r"random_k_ef_: seed must be an int, got 1.0 \(float\)"),
        ({"k": 5, "value_dtype": torch.int8}, "random_k_ef_: value_dtype must be float32, .* got torch.int8"),
    ],
    ids=["neither", "ratio", "k", "seed", "type", "value_dtype"],
)
def test_random_k_bad_options_change_nothing(options: dict[str, Any], text: str) -> None:
    grad, err = pair()
    before = err.clone()
    arguments = {"seed": 1, **options}
    with pytest.raises(ArgumentError, match=f"^{text}"):
        gck.random_k_ef_(grad, err, **arguments)
    with pytest.raises(ArgumentError, match=f"^{text.replace('_ef_', '')}"):
        gck.random_k(grad, **arguments)
    assert torch.equal(err, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, r"low_rank_ef_: rank must be in \[1, 64\], got 0"),
        ({"rank": 65}, r"low_rank_ef_: rank must be in \[1, 64\], got 65"),
        ({"rank": 2.0}, r"low_rank_ef_: rank must be an int, got 2.0 \(float\)"),
        ({"rank": None}, "low_rank_ef_: rank must be an int, got None"),
        ({"rank": True}, r"low_rank_ef_: rank must be an int, got True \(bool\)"),
        ({"columns": 0}, r"low_rank_ef_: columns must be in \[1, 2147483647\], got 0"),
        ({"columns": -3}, r"low_rank_ef_: columns must be in \[1, 2147483647\], got -3"),
        ({"columns": 2**31}, r"low_rank_ef_: columns must be in \[1, 2147483647\], got 2147483648"),
        ({"columns": "32"}, r"low_rank_ef_: columns must be an int, got '32' \(str\)"),
        ({"columns": False}, r"low_rank_ef_: columns must be an int, got False \(bool\)"),
        ({"seed": 2**63}, r"low_rank_ef_: seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"seed": None}, "low_rank_ef_: seed must be an int, got None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_low_rank_bad_options_change_nothing(options: dict[str, Any], text: str) -> None:
    grad, err = pair()
    before = err.clone()
    arguments = {"seed": 1, **options}
    with pytest.raises(ArgumentError, match=f"^{text}"):
        gck.low_rank_ef_(grad, err, **arguments)
    with pytest.raises(ArgumentError, match=f"^{text.replace('_ef_', '')}"):
        gck.low_rank(grad, **arguments)
    assert torch.equal(err, before)


def test_low_rank_of_rows_that_are_too_long() -> None:
    x = torch.empty(1, 2**31, device="meta")
    with pytest.raises(
        ArgumentError, match=r"^low_rank: columns must be in \[1, 2147483647\], got 2147483648"
    ):
        gck.low_rank(x, seed=1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_recorded_graph(function: str) -> None:
    call = FUNCTIONS[function]
    grad, err = pair()
    with pytest.raises(AutogradError, match=f"{function}: grad requires grad in a recorded graph"):
        call(grad.clone().requires_grad_(), err)
    parameter = torch.nn.Parameter(grad.clone())
    with torch.no_grad():
        call(parameter, err)  # nothing is recorded here, so nothing is wrong


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_name_the_function(function: str) -> None:
    grad, err = pair()
    for bad in ((grad, err.double()), (grad[::2], err), (grad.int(), err), (grad, err[1:]), (grad, grad)):
        with pytest.raises(gck.errors.GckError, match=f"^{function}: "):
            FUNCTIONS[function](*bad)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_that_are_negated_lazily_are_not_written_to(function: str) -> None:
    grad, err = pair()
    before = err.clone()
    with pytest.raises(LayoutError, match=f"^{function}: err is negated lazily, and cannot be written to"):
        FUNCTIONS[function](grad, torch._neg_view(err))
    with pytest.raises(LayoutError, match=r"^decompress: out is negated lazily"):
        gck.decompress(gck.sign_ef_(grad, err.clone()), out=torch._neg_view(err))
    assert torch.equal(err, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nested_tensors(function: str) -> None:
    grad, err = pair()
    before = err.clone()
    for name, pair_of in (("grad", (nested(grad), err)), ("err", (grad, nested(err)))):
        with pytest.raises(LayoutError, match=f"^{function}: {name} must be contiguous, got a nested tensor"):
            FUNCTIONS[function](*pair_of)
    assert torch.equal(err, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_in_lists() -> None:
    grad, err = pair()
    before = err.clone()
    for name, grads, errs in (("grad", nested(grad), err), ("err", grad, nested(err))):
        with pytest.raises(LayoutError, match=rf"^topk_ef_: {name}\[1\] must be contiguous, got a nested"):
            gck.topk_ef_([grad, grads], [err, errs], k=3)
    assert torch.equal(err, before)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def test_payloads_and_bodies_whose_storage_was_freed() -> None:
    grad, err = pair()
    payload = gck.topk(grad, k=3)
    broken = payload._replace(values=freed(payload.values))
    with pytest.raises(LayoutError, match=r"^decompress: payload 0 field 0 has no memory"):
        gck.decompress([broken, broken])
    compressor, before = gck.Sign(), err.clone()
    bodies = torch.zeros(1, compressor.layout(grad.numel()).nbytes, dtype=torch.uint8)
    with pytest.raises(LayoutError, match=r"^Sign.compress_: bodies have no memory, got a tensor"):
        compressor.compress_(grad, err, freed(bodies))
    assert torch.equal(err, before)


@pytest.mark.parametrize(
    "compressor",
    [gck.Sign(), gck.Quantize(), gck.ChunkTopK(), gck.TopK(k=3), gck.RandomK(k=3, seed=0), gck.LowRank()],
    ids=str,
)
def test_compressors_refuse_a_gradient_that_is_negated_lazily(compressor: Any) -> None:
    """Of which memory holds the opposite."""
    grad, err = pair()
    before, bodies = err.clone(), torch.zeros(1, compressor.layout(grad.numel()).nbytes, dtype=torch.uint8)
    with pytest.raises(LayoutError, match=r"compress_: grad is negated lazily; pass grad.resolve_neg\(\)"):
        compressor.compress_(torch._neg_view(grad), err, bodies)
    assert torch.equal(err, before)
    assert not bodies.any()


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor[:300], tensor[300:]])
