"""Tensors that have no memory, or whose elements are not what lies there: none is taken for plain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gck
from gck.errors import ArgumentError
from gck.message import to_buffers
from tests.cases import same_bytes

PAYLOAD = gck.topk(torch.tensor([1.0, -5.0, 0.5, 3.0, 4.0]), k=4)
MESSAGE = gck.to_bytes(PAYLOAD)


def freed(tensor: Tensor) -> Tensor:
    one = tensor.clone()
    one.untyped_storage().resize_(0)
    return one


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([tensor[:1], tensor[1:]])


def masked(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        made: Any = torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))
    result: Tensor = made
    return result


def shortened(tensor: Tensor) -> Tensor:
    one = tensor.clone()
    one.untyped_storage().resize_(one.nbytes - 1)
    return one


UNREADABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "shortened": shortened,
    "meta": lambda tensor: tensor.to("meta"),
    "fake": fake,
    "nested": nested,
    "masked": masked,
    "zeros of forward mode": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "sparse": lambda tensor: tensor.to_sparse(),
    "conjugate": lambda tensor: tensor.to(torch.complex64).conj(),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_refused(kind: str) -> None:
    make = UNREADABLE[kind]
    for write in (gck.to_bytes, to_buffers):
        with pytest.raises(ArgumentError, match=rf"^{write.__name__}: .*values"):
            write(PAYLOAD._replace(values=make(PAYLOAD.values)))
    if kind == "masked":  # not of bytes
        return
    data = torch.frombuffer(bytearray(MESSAGE), dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"^from_bytes: data "):
        gck.from_bytes(make(data))


@pytest.mark.parametrize("in_place", [True, False])
def test_lazily_negated_values_are_written_negated(in_place: bool) -> None:
    """In the memory of such a view lies the opposite."""
    values = PAYLOAD.values if in_place else PAYLOAD.values.clone()
    negated = gck.from_bytes(gck.to_bytes(PAYLOAD._replace(values=torch._neg_view(values))))
    assert isinstance(negated, gck.SparseGrad)
    assert same_bytes(negated.values, -PAYLOAD.values)
