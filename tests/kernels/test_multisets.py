"""Selection from any multiset of a few values, of any length, compared with the oracle by bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from tests.cases import GRAD_DTYPES
from tests.contract import check_case
from tests.kernels.test_topk_inputs import counts

# Few distinct values make ties; the special ones make trouble.
VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-149, -1e-40, 3e38, math.inf, -math.inf, math.nan, 65520.0, 1e-3]
)
# Within a vector, a tile, what is selected from maxima of groups, and from a sample.
NUMELS = st.one_of(
    st.integers(1, 40), st.integers(41, 5000), st.integers(5001, 65_600), st.integers(65_601, 200_000)
)

PACKED = [
    gck.Sign(),
    *(gck.Quantize(bits, rounding=how, seed=7) for bits in (8, 4, 2) for how in ("nearest", "stochastic")),
    gck.Quantize(2, scale="mean"),
]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(grad, err): a few values, each with its share, shuffled or in runs."""
    n = draw(NUMELS)
    pair = []
    for _ in range(2):
        values = torch.tensor(draw(st.lists(VALUES, min_size=1, max_size=5)))
        # Shares go down to one entry in 2^16: a value may be too rare for a sample.
        shares = torch.tensor([2.0 ** -draw(st.integers(0, 16)) for _ in values]).double()
        ends = (shares.cumsum(0) / shares.sum() * n).round().long()
        ends[-1] = n
        x = values.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
        order = draw(st.sampled_from(["runs", "shuffled", "strided"]))
        if order == "shuffled":
            x = x[torch.randperm(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))]
        elif order == "strided":
            x = x[torch.arange(n) * 1009 % n]
        pair.append(x)
    return pair[0].to(draw(st.sampled_from(GRAD_DTYPES))), pair[1]


@settings(max_examples=150, deadline=None)
@given(pair=pairs(), data=st.data())
def test_topk(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    grad, err = pair
    k = data.draw(st.one_of(st.sampled_from(counts(grad, err)), st.integers(1, grad.numel())))
    value_dtype = data.draw(st.sampled_from(GRAD_DTYPES))
    check_case(gck.TopK(k=k, value_dtype=value_dtype), "cpu", grad, err)


@settings(max_examples=100, deadline=None)
@given(pair=pairs(), levels=st.integers(5, 16), data=st.data())
def test_chunk_topk(pair: tuple[Tensor, Tensor], levels: int, data: st.DataObject) -> None:
    half = 2**levels // 2
    k = data.draw(st.one_of(st.integers(1, min(half, 80)), st.integers(1, half), st.just(half)))
    bits = data.draw(st.sampled_from([32, 16, 8, 4, 2]))
    check_case(gck.ChunkTopK(k, 2**levels, bits), "cpu", *pair)


@settings(max_examples=100, deadline=None)
@given(pair=pairs(), compressor=st.sampled_from(PACKED), levels=st.integers(5, 13))
def test_packed(pair: tuple[Tensor, Tensor], compressor: Any, levels: int) -> None:
    check_case(replace(compressor, chunk_size=2**levels), "cpu", *pair)
