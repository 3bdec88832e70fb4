"""Whatever is wrong with what a reduction is given: a typed error, and nothing was changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gck
from gck.errors import (
    ArgumentError,
    CorruptPayloadError,
    DeviceMismatchError,
    DtypeError,
    GckError,
    LayoutError,
    ShapeMismatchError,
)
from tests.kernels.reductions import payloads

GOOD_N = 300
BAD: dict[str, tuple[type[GckError], str, dict[str, Any]]] = {
    "numel": (ArgumentError, r"numel must be in \[0, capacity\], got 301 and 300", {"numel": 301}),
    "float numel": (DtypeError, r"numel must be an int, got 300.0 \(float\)", {"numel": 300.0}),
    "divisor": (ArgumentError, r"divisor must be in \[1, 16777216\], got 0", {"divisor": 0}),
    "bodies": (CorruptPayloadError, "bodies must be", {"bodies": torch.zeros(2, 16, dtype=torch.uint8)}),
    "err": (ShapeMismatchError, "err must have 300 elements, got 299", {"err": torch.zeros(299)}),
    "err half": (DtypeError, "err must be float32", {"err": torch.zeros(300).half()}),
    "err strided": (LayoutError, "err must be contiguous", {"err": torch.zeros(600)[::2]}),
    "body": (ShapeMismatchError, "body must be", {"body": torch.zeros(16, dtype=torch.uint8)}),
    "body int8": (ShapeMismatchError, "of torch.int8", {"body": torch.zeros(64, dtype=torch.int8)}),
    "nonfinite": (DtypeError, "nonfinite must be int64", {"nonfinite": torch.zeros(1)}),
    "device": (DeviceMismatchError, "device of bodies", {"err": torch.zeros(300, device="meta")}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "compressor", [gck.Sign(32), gck.Quantize(4, 32), gck.ChunkTopK(5, 32, server_k=5)], ids=str
)
def test_bad_input_changes_nothing(compressor: Any, bad: str) -> None:
    error, text, change = BAD[bad]
    body = torch.zeros(compressor.layout(GOOD_N).nbytes, dtype=torch.uint8)
    given = {
        "bodies": payloads(compressor, 2, GOOD_N, GOOD_N),
        "err": torch.ones(GOOD_N),
        "body": body,
        "numel": GOOD_N,
        "capacity": GOOD_N,
    } | change
    err = given["err"]
    before = err.clone()
    with pytest.raises(error, match=rf"^{type(compressor).__name__}\.reduce_: .*{text}"):
        compressor.reduce_(**given)
    assert err.is_meta or torch.equal(err, before)
    assert not body.any()


def test_tensors_that_overlap() -> None:
    compressor = gck.Sign(32)
    nbytes = compressor.layout(GOOD_N).nbytes
    memory = torch.zeros(3, nbytes, dtype=torch.uint8)
    with pytest.raises(LayoutError, match=r"Sign\.reduce_: .*overlap in memory"):
        compressor.reduce_(memory, torch.zeros(GOOD_N), memory[1], GOOD_N)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_corrupt_payload_changes_nothing(rank: int) -> None:
    compressor = gck.ChunkTopK(k=4, chunk_size=64, index_bits=16, server_k=4)
    n = 70_000
    bodies = payloads(compressor, 3, n, n)
    compressor.layout(n).views(bodies[rank])[2].view(torch.int16)[4 * 500 + 2] = 64
    err, body = torch.ones(n), torch.zeros(compressor.layout(n).nbytes, dtype=torch.uint8)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    text = rf"^ChunkTopK\.reduce_: indices .* entry 2 of chunk 500 does not in body {rank}$"
    with pytest.raises(CorruptPayloadError, match=text):
        compressor.reduce_(bodies, err, body, n, nonfinite=nonfinite)
    assert torch.equal(err, torch.ones(n))
    assert not body.any()
    assert not nonfinite.any()
