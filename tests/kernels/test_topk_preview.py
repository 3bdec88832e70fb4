"""Top-k that says what it will send and leaves the residual alone: the bytes of compressing, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from bench import inputs
from gck.compressor import preview_, previews
from gck.errors import DtypeError, ShapeMismatchError
from gck.kernels.topk import TopK
from tests.cases import same_bytes

LEAST = 1 << 16  # entries that are sampled


def pair(kind: str, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    grad, err = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    if kind == "ties":
        grad = torch.randint(-3, 4, (n,), generator=generator).float()
        err.zero_()
    elif kind == "nonfinite":
        grad[torch.randint(n, (9,), generator=generator)] = torch.nan
        grad[7], err[n - 1] = torch.inf, -torch.inf
    elif kind == "huge":
        grad *= 1e38
    elif kind == "few":
        grad[torch.rand(n, generator=generator) < 0.999] = 0
        err.zero_()
    elif kind == "sorted":
        grad, err = grad.abs().sort().values, torch.zeros(n)
    return grad, err


def bodies_of(compressor: TopK, n: int) -> Tensor:
    return torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)


def previewed(compressor: TopK, grad: Tensor, err: Tensor) -> bool:
    """Whether there was a preview; checks it."""
    before, body, again = (
        err.clone(),
        bodies_of(compressor, grad.numel()),
        bodies_of(compressor, grad.numel()),
    )
    done = preview_(compressor, grad, err, body)
    assert same_bytes(err, before)
    compressor.compress_(grad, err, again)
    assert same_bytes(body, again if done else torch.zeros_like(body))
    return done


@pytest.mark.parametrize("n", [LEAST, LEAST + 1, 200_003, 1_100_001])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "nonfinite", "huge", "few", "sorted"])
def test_bytes(kind: str, n: int) -> None:
    for ratio in (0.0001, 0.01, 0.1, 0.45):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for value_dtype in (torch.float32, torch.bfloat16):
                grad, err = pair(kind, n)
                done = previewed(TopK(ratio=ratio, value_dtype=value_dtype), grad.to(dtype), err)
                assert done or kind != "gaussian"


@pytest.mark.parametrize("name", [name for name in inputs.INPUTS if "sample" in name])
def test_there_is_none_where_the_sample_misleads(name: str) -> None:
    """Which also shows that these inputs are made for the sample that the CPU draws."""
    grad, err = inputs.make(name, 1_100_001)
    assert not previewed(TopK(ratio=inputs.DENSITY), grad, err)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert previewed(TopK(ratio=0.01), *pair("gaussian", 1_100_001))
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize(
    "options",
    [
        {"index_codec": "elias_fano"},
        {"index_codec": "block16", "value_bits": 8},
        {"value_bits": 4},
        {"index_codec": "block16", "value_dtype": torch.float16},
    ],
    ids=str,
)
def test_coded(options: dict[str, Any]) -> None:
    assert previewed(TopK(ratio=0.01, **options), *pair("gaussian", 300_000))


def test_nothing_is_done() -> None:
    """Where a threshold is not to be guessed, or the residual is read with options, or there is none."""
    assert not previewed(TopK(ratio=0.01), *pair("gaussian", LEAST - 1))
    assert not previewed(TopK(ratio=0.6), *pair("gaussian", LEAST))
    assert not previewed(TopK(ratio=1.0), *pair("gaussian", LEAST))
    assert not previewed(TopK(ratio=0.01), torch.ones(LEAST), torch.zeros(LEAST))  # all alike
    assert not previewed(TopK(k=1), torch.zeros(0), torch.zeros(0))
    for compressor in (TopK(ratio=0.01, decay=0.9), TopK(ratio=0.01, clip=1.0), gck.Sign()):
        assert not previews(compressor)
    grad, err = pair("gaussian", LEAST)
    body = bodies_of(TopK(ratio=0.01), LEAST)
    for compressor in (TopK(ratio=0.01, decay=0.9), gck.Sign()):
        assert not preview_(compressor, grad, err, body)
    assert not preview_(TopK(ratio=0.01), grad, None, body)
    assert not body.any()


def test_writes_to_the_body_only() -> None:
    compressor, (grad, err) = TopK(ratio=0.01), pair("gaussian", 100_000)
    nbytes = compressor.layout(100_000).nbytes
    whole = torch.full((1, nbytes + 128), 77, dtype=torch.uint8)
    body = whole[:, 64:-64]
    assert preview_(compressor, grad, err, body.zero_())
    assert body.any()
    assert whole[:, :64].eq(77).all()
    assert whole[:, -64:].eq(77).all()


def test_errors() -> None:
    compressor, (grad, err) = TopK(ratio=0.01), pair("gaussian", LEAST)
    body = bodies_of(compressor, LEAST)
    with pytest.raises(DtypeError, match=r"TopK\.preview_: err"):
        preview_(compressor, grad, err.double(), body)
    with pytest.raises(ShapeMismatchError, match=r"TopK\.preview_: bodies"):
        preview_(compressor, grad, err, body[:, 16:].contiguous())
