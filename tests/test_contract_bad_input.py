"""Whatever is wrong with what a compressor is given: a typed error, and nothing was changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from tests.contract import COMPRESSORS

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
    with pytest.raises(gck.errors.DtypeError, match=r"bodies must be a tensor, got \[0, 0, .* \(list\)"):
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
