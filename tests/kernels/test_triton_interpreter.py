"""The Triton kernels, run by Triton's interpreter: every byte against the oracle, over several tiles.

The contract test covers one tile of everything; here lie what only shows between tiles and programs, the
hostile payloads, and what the interpreter cannot check about a launch.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from tests.cases import Guarded, make, one_nan, same_bytes
from tests.contract import SCALED_BY_MEANS, a_denormal_alone, check_case
from tests.kernels.bits import bit_patterns
from tests.kernels.launches import recorded

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.compressor import shard_numel
from gck.kernels.sign import gpu as sign
from gck.kernels.sign import reference as sign_reference
from gck.kernels.topk import gpu as topk
from gck.kernels.topk import reference as topk_reference


@pytest.mark.parametrize("compressor", SCALED_BY_MEANS, ids=str)
def test_what_is_negative_of_a_scale_of_zero(compressor: Any) -> None:
    """-0: the mean of a denormal and zeros is 0, which Triton 3.6 would subtract from 0."""
    check_case(compressor, "interpreter", *a_denormal_alone())


@pytest.mark.parametrize("chunk_size", [32, 64, 256, 512, 1024, 8192])
def test_sign_chunk_sizes(chunk_size: int) -> None:
    for case, dtype in (("few nonfinite", torch.float32), ("huge", torch.bfloat16)):
        for n in (chunk_size - 1, 2 * chunk_size, 2 * chunk_size + 1):
            check_case(gck.Sign(chunk_size), "interpreter", *make(case, n, dtype))


@pytest.mark.parametrize("shards", [3, 5])
@pytest.mark.parametrize("chunk_size", [32, 256, 8192])
def test_sign_shards(chunk_size: int, shards: int) -> None:
    # More than two groups of chunks a shard, the last group cut by the shard's end.
    n = shards * max(2 * sign.WARP_ELEMENTS, chunk_size) + 3 * chunk_size + 9
    check_case(gck.Sign(chunk_size), "interpreter", *make("gaussian", n, torch.float16), shards=shards)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_random_bits(dtype: torch.dtype) -> None:
    n = 5000
    grad = torch.arange(-(2**15), 2**15)[:: 2**16 // n][:n].to(torch.int16).view(dtype)
    grad[:600] = torch.arange(600).to(torch.int16).view(dtype)  # denormals and the smallest normals
    for compressor in (gck.TopK(k=n), gck.TopK(k=n // 2, value_dtype=dtype), gck.Sign(32)):
        check_case(compressor, "interpreter", grad, torch.full((n,), -0.0))


def test_sign_of_random_bits() -> None:
    n = 40_000
    check_case(gck.Sign(32), "interpreter", torch.full((n,), -0.0), bit_patterns(n, 2))
    finite = bit_patterns(n, 3)
    finite = torch.where(finite.isfinite(), finite, 0.0)
    check_case(gck.Sign(256), "interpreter", torch.full((n,), -0.0), finite)


@pytest.mark.parametrize("alpha", [1.0, -0.1, 1e-42, 3e38])
def test_decode_scales_in_one_rounding_and_adds_in_another(alpha: float) -> None:
    n = 3000
    grad, err = make("gaussian", n, torch.float32)
    base = torch.linspace(-1e-3, 1e3, n)
    for module, reference, compressor in (
        (topk, topk_reference, gck.TopK(ratio=0.5, value_dtype=torch.bfloat16)),
        (sign, sign_reference, gck.Sign(64)),
    ):
        fields, _, _ = reference.compress(compressor, grad, err)
        dense = torch.tensor(alpha) * reference.decompress(compressor, fields, n)
        reached = dense != 0
        for accumulate in (False, True):
            out = Guarded.of(base if accumulate else torch.full((n,), math.nan))
            module.decompress_(compressor, out.inner, fields, alpha, accumulate)
            wanted = torch.where(reached, base + dense, base) if accumulate else dense
            assert torch.equal(out.inner, wanted)
            assert out.intact()


def test_sign_decodes_a_body_laid_out_for_more() -> None:
    grad, err = make("gaussian", 5000, torch.float32)
    fields, _, _ = sign_reference.compress(gck.Sign(256), grad, err)
    dense = sign_reference.decompress(gck.Sign(256), fields, 5000)
    for n in (1, 255, 2049, 4999):
        out = Guarded.of(torch.full((n,), math.nan))
        sign.decompress_(gck.Sign(256), out.inner, fields, 1.0, False)
        assert same_bytes(one_nan(out.inner), dense[:n])
        assert out.intact()


@pytest.mark.parametrize("compressor", [gck.TopK(k=3), gck.Sign(32)], ids=str)
def test_the_counter_is_optional(compressor: Any) -> None:
    module = {"topk": topk, "sign": sign}[compressor.name]
    grad, err = torch.full((100,), math.nan), torch.zeros(100)
    module.compress_(compressor, grad, err, body_of(compressor, 100), None)
    assert not err.any()


def body_of(compressor: Any, n: int, shards: int = 1) -> Tensor:
    nbytes = compressor.layout(shard_numel(n, compressor.shard_unit, shards)).nbytes
    return torch.zeros(shards, nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("compressor", [gck.TopK(k=30), gck.Sign(64)], ids=str)
def test_launches(compressor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values, and contraction pinned off."""
    module = {"topk": topk, "sign": sign}[compressor.name]
    n = 9001
    shapes = []
    for case in ("gaussian", "all nan", "all zero"):
        grad, err = make(case, n, torch.float32)
        body, out = body_of(compressor, n), torch.zeros(n)
        fields = compressor.layout(n).views(body[0])

        def run(grad: Tensor = grad, err: Tensor = err, body: Tensor = body, out: Tensor = out) -> None:
            module.compress_(compressor, grad, err, body, None)
            module.decompress_(compressor, out, compressor.layout(n).views(body[0]), 1.0, True)

        launches = recorded(monkeypatch, run)
        assert len(launches) >= 2
        assert all(kwargs["enable_fp_fusion"] is False for _, _, kwargs in launches)
        shapes.append([(fn.__name__, grid, kwargs) for fn, grid, kwargs in launches])
        assert fields[0].numel()
    assert shapes[0] == shapes[1] == shapes[2]


def test_empty_shards_launch_no_writes() -> None:
    """Five shards of two chunks: the last rows stay as they were."""
    compressor = gck.Sign(32)
    body = body_of(compressor, 70, shards=5)
    grad = torch.ones(70)
    sign.compress_(compressor, grad, torch.zeros(70), body, None)
    assert body[:3].any(dim=1).all()
    assert not body[3:].any()
