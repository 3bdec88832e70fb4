"""Sums of payloads: one pass over the result gives the bytes of one payload after the other."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck._native import sees_tensors
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError, LayoutError, ShapeMismatchError
from gck.ops import decode, direct
from gck.wire import ALIGNMENT, body_of, layout_of
from tests.cases import make, one_nan, same_bytes

SIZES = [1, 33, 4096, 70_001, 2_100_003]  # the last is written past the caches


def topk(n: int, rank: int, value_dtype: torch.dtype = torch.float32) -> gck.SparseGrad:
    grad, err = make("few nonfinite" if rank == 1 else "gaussian", n + rank, torch.float32)
    grad, err = grad[:n].clone(), err[:n].clone()
    if rank == 2:
        grad[: n // 2] *= 100  # an uneven spread of indices
    return gck.topk_ef_(grad, err, 0.05, value_dtype=value_dtype)


def signs(n: int, rank: int) -> gck.PackedSigns:
    grad, err = make("gaussian", n + rank, torch.float32)
    return gck.sign_ef_(grad[:n].clone(), err[:n].clone(), 64)


KINDS: dict[str, Callable[[int, int], Any]] = {
    "topk": topk,
    "topk bf16": lambda n, rank: topk(n, rank, torch.bfloat16),
    "topk fp16": lambda n, rank: topk(n, rank, torch.float16),
    "sign": signs,
}


def gathered(payloads: list[Any], gap: int = 0) -> tuple[list[Any], Tensor]:
    """The same payloads in the rows of one buffer, `gap` bytes apart, as they come from other ranks."""
    layout = layout_of(*payloads[0].fields)
    rows = torch.full((len(payloads), layout.nbytes + gap), 0xA5, dtype=torch.uint8)
    for row, payload in zip(rows, payloads, strict=True):
        row[: layout.nbytes] = body_of(*payload.fields)
    rest = payloads[0][len(payloads[0].fields) :]
    return [type(payloads[0])(*layout.views(row[: layout.nbytes]), *rest) for row in rows], rows


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_after_the_other(kind: str, n: int, world: int) -> None:
    payloads = [KINDS[kind](n, rank) for rank in range(world)]
    for given in (payloads, gathered(payloads)[0], gathered(payloads, gap=48)[0]):
        out, wanted = torch.full((n,), math.nan), torch.zeros(n)
        if world == 1:
            gck.decompress(payloads[0], out=wanted)
        else:
            for payload in payloads:
                gck.decompress_add_(wanted, payload)
        assert gck.decompress(given, out=out) is out
        assert same_bytes(one_nan(out), one_nan(wanted))
        assert same_bytes(one_nan(gck.decompress(given)), one_nan(wanted))

        base = torch.linspace(-2, 3, n)
        summed, one_by_one = base.clone(), base.clone()
        for payload in payloads:
            gck.decompress_add_(one_by_one, payload, 0.7)
        assert gck.decompress_add_(summed, given, 0.7) is summed
        assert same_bytes(one_nan(summed), one_nan(one_by_one))


@pytest.mark.parametrize("kind", ["topk", "sign", "chunk_topk"])
def test_memory_that_no_one_touched_yet(kind: str) -> None:
    """Where a large result gets its pages before it is written."""
    n = 2_500_001
    if kind == "chunk_topk":
        payload: Any = gck.chunk_topk_ef_(*(part[:n] for part in make("gaussian", n, torch.float32)), 512, 8)
    else:
        payload = KINDS[kind](n, 0)
    untouched = mmap.mmap(-1, 4 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    out = gck.decompress(payload, out=torch.frombuffer(untouched, dtype=torch.float32))
    assert same_bytes(out, gck.decompress(payload, out=torch.full((n,), math.nan)))


@pytest.mark.skipif(not sees_tensors(), reason="torch has no DLPack table of functions")
def test_payloads_that_lie_apart_are_copied_to_memory_that_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiled module cannot read them where they lie: fresh pages for all of them took longer than
    the decoding."""
    monkeypatch.setattr(direct, "decompress", lambda *_: None)
    payloads, places = [signs(2_100_003, rank) for rank in range(4)], []
    original = decode._decompress_sum

    def watched(out: Tensor, bodies: Tensor, *rest: Any) -> None:
        places.append(bodies.data_ptr())
        original(out, bodies, *rest)

    monkeypatch.setattr(decode, "_decompress_sum", watched)
    for _ in range(4):
        gck.decompress(payloads, out=torch.empty(2_100_003))
    assert len(set(places)) == 1
    assert places[0] % ALIGNMENT == 0


def test_order_counts() -> None:
    """Sums follow the order of the list, which rounding makes visible."""
    payloads = [gck.topk(torch.tensor([value]), k=1) for value in (1.0, 2.0**24, -(2.0**24))]
    assert gck.decompress(payloads).item() == 0.0
    assert gck.decompress(payloads[::-1]).item() == 1.0


def test_rows_of_one_buffer_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what the compiled module leaves to others, either; where it looks, see test_direct_lists.py."""
    monkeypatch.setattr(direct, "decompress", lambda *_: None)
    payloads = [topk(70_001, rank) for rank in range(4)]
    seen: list[Tensor] = []
    original = decode._decompress_sum

    def watched(out: Tensor, bodies: Tensor, *rest: Any) -> None:
        seen.append(bodies)
        original(out, bodies, *rest)

    monkeypatch.setattr(decode, "_decompress_sum", watched)
    for gap in (0, 48):
        rows, buffer = gathered(payloads, gap)
        gck.decompress(rows)
        assert seen[-1].data_ptr() == buffer.data_ptr()
        assert seen[-1].stride(0) == buffer.stride(0)
        # Out of order they are in one buffer, but not one behind the other: copied, and right.
        turned = gck.decompress(rows[::-1])
        assert seen[-1].data_ptr() != buffer.data_ptr()
        assert same_bytes(one_nan(turned), one_nan(gck.decompress(payloads[::-1])))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("position", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("wrong", ["negative", "beyond", "twice", "order"])
def test_a_corrupt_payload_changes_nothing(wrong: str, position: int, row: int, accumulate: bool) -> None:
    n = 300_007
    payloads, _ = gathered([topk(n, rank) for rank in range(3)])
    indices = payloads[row].indices
    place = position % indices.numel()
    if wrong in ("twice", "order"):
        place = max(place, 1)
        indices[place] = indices[place - 1] if wrong == "twice" else 0
        if wrong == "order" and place == 1:
            indices[0] = 1
    else:
        indices[place] = -1 if wrong == "negative" else n
    # The first entry at which something is wrong: after one that is too large, its successor is as well.
    function = "decompress_add_" if accumulate else "decompress"
    where = rf"\[0, {n}\), got -?\d+ at position {place}$"
    text = rf"^{function}: payload {row}: indices must ascend within {where}"
    out = torch.arange(float(n))
    call = gck.decompress_add_ if accumulate else lambda o, p: gck.decompress(p, out=o)
    with pytest.raises(CorruptPayloadError, match=text):
        call(out, payloads)
    assert torch.equal(out, torch.arange(float(n)))


def test_bad_lists_change_nothing() -> None:
    n, out = 1000, torch.arange(1000.0)
    one = topk(n, 0)
    others: dict[str, tuple[type[Exception], str, Any]] = {
        "kind": (ShapeMismatchError, "payload 1 must be of the kind, options and size", signs(n, 0)),
        "numel": (ShapeMismatchError, "numel=1001", one._replace(numel=1001)),
        "k": (ShapeMismatchError, r"values=\(10,\) torch\.float32", gck.topk(torch.ones(n), k=10)),
        "dtype": (ShapeMismatchError, r"values=\(50,\) torch\.bfloat16", topk(n, 0, torch.bfloat16)),
        "nothing": (DtypeError, "payload must be a payload of gck, got None$", None),
        "tuple": (DtypeError, r"got \(1,\) \(tuple\); several are given as a list$", (1,)),
    }
    for error, text, other in others.values():
        with pytest.raises(error, match=text):
            gck.decompress_add_(out, [one, other])
    with pytest.raises(ArgumentError, match=r"decompress: payload must be .* at least one, got \[\]"):
        gck.decompress([])
    with pytest.raises(ShapeMismatchError, match="chunk_size=32"):
        gck.decompress([signs(n, 0), gck.sign_ef_(torch.ones(n), torch.ones(n), 32)], out=out)
    with pytest.raises(ArgumentError, match="alpha must be a finite number of fp32, got inf"):
        gck.decompress_add_(out, [one, one], math.inf)
    with pytest.raises(ShapeMismatchError, match="out has 999 elements, the payload is of 1000"):
        gck.decompress([one, one], out=out[:999])
    assert torch.equal(out, torch.arange(1000.0))


def test_an_out_on_one_of_the_payloads_is_refused() -> None:
    payloads, _ = gathered([topk(10_000, rank) for rank in range(2)])
    lies_on = payloads[1].values
    before = [field.clone() for payload in payloads for field in payload.fields]
    with pytest.raises(LayoutError, match=r"decompress: .*overlap in memory"):
        gck.decompress(
            [payload._replace(numel=lies_on.numel()) for payload in (payloads[0], payloads[1])], out=lies_on
        )
    after = [field for payload in payloads for field in payload.fields]
    assert all(same_bytes(a, b) for a, b in zip(after, before, strict=True))


def test_a_sum_of_one_starts_from_zero() -> None:
    payload = gck.SparseGrad(torch.tensor([-0.0]), torch.tensor([1], dtype=torch.int32), 3)
    assert not gck.decompress([payload]).signbit().any()
    assert gck.decompress(payload).signbit().tolist() == [False, True, False]
