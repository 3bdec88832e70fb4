"""gck.topk_ef_ of lists of tensors: as a loop over them, or as their concatenation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gck
from bench import inputs
from gck.errors import ArgumentError, AutogradError, DtypeError, GckError, LayoutError, ShapeMismatchError
from gck.wire import body_of
from tests.cases import make, same_bytes

# Empty, one, few, a tile and one more, enough for a sample, enough for all threads together.
SIZES = (0, 1, 5, 4097, 0, 70_001, 33, 600_000, 300_007)


def lists(case: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> tuple[list[Tensor], list[Tensor]]:
    # Of no elements there is but one case.
    pairs = [make(case if n else "gaussian", n, dtypes[i % len(dtypes)]) for i, n in enumerate(SIZES)]
    return [grad for grad, _ in pairs], [err for _, err in pairs]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same(ours: gck.SparseGrad, theirs: gck.SparseGrad) -> None:
    assert same_bytes(ours.values, theirs.values)
    assert same_bytes(ours.indices, theirs.indices)
    assert ours.numel == theirs.numel


MIXED = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), MIXED], ids=str)
@pytest.mark.parametrize("case", ["gaussian", "ties", "few nonfinite", "all zero", "clustered"])
def test_each_is_a_loop(case: str, dtypes: tuple[torch.dtype, ...]) -> None:
    grads, errs = lists(case, dtypes)
    before, looped = copies(grads), copies(errs)
    counters = torch.zeros(2, 1, dtype=torch.int64)
    payloads = gck.topk_ef_(grads, errs, 0.01, value_dtype=torch.bfloat16, nonfinite=counters[0])
    assert len(payloads) == len(SIZES)
    for i, payload in enumerate(payloads):
        wanted = gck.topk_ef_(grads[i], looped[i], 0.01, value_dtype=torch.bfloat16, nonfinite=counters[1])
        assert_same(payload, wanted)
        assert same_bytes(errs[i], looped[i])
        assert same_bytes(grads[i], before[i])
    assert counters[0] == counters[1]
    assert bool(counters[1]) == (case == "few nonfinite")


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16,)], ids=str)
@pytest.mark.parametrize("case", ["gaussian", "ties", "nonfinite", "all zero", "sorted"])
@pytest.mark.parametrize("amount", [{"ratio": 0.01}, {"ratio": 1.0}, {"k": 1}, {"k": 500_000}], ids=str)
def test_flat_is_the_concatenation(amount: Any, case: str, dtypes: tuple[torch.dtype, ...]) -> None:
    grads, errs = lists(case, dtypes)
    grad, err = torch.cat(grads), torch.cat(errs)
    counters = torch.zeros(2, 1, dtype=torch.int64)
    payload = gck.topk_ef_(grads, errs, flat=True, nonfinite=counters[0], **amount)
    assert_same(payload, gck.topk_ef_(grad, err, nonfinite=counters[1], **amount))
    assert same_bytes(torch.cat(errs), err)
    assert counters[0] == counters[1]


def test_flat_of_mixed_dtypes() -> None:
    grads, errs = lists("gaussian", MIXED)
    grad, err = torch.cat([grad.float() for grad in grads]), torch.cat(errs)
    assert_same(gck.topk_ef_(grads, errs, 0.02, flat=True), gck.topk_ef_(grad, err, 0.02))
    assert same_bytes(torch.cat(errs), err)


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_flat_of_hard_inputs(name: str) -> None:
    """Cut in unequal parts, one of them not at a multiple of anything."""
    grad, err = inputs.make(name, 300_007)
    sizes = [100_003, 0, 17, 65_536, 134_451]
    grads, errs = copies(list(grad.split(sizes))), copies(list(err.split(sizes)))
    for k in (1, 3000, 30_000, 200_000):
        payload = gck.topk_ef_(grads, errs, k=k, flat=True)
        assert_same(payload, gck.topk_ef_(grad, err, k=k))
        assert same_bytes(torch.cat(errs), err)


@pytest.mark.parametrize(
    "options", [{"decay": 0.9}, {"decay": 0.5, "clip": 0.25}, {"clip": torch.tensor([1e-3])}], ids=str
)
@pytest.mark.parametrize("case", ["gaussian", "ties", "few nonfinite"])
def test_residuals_that_fade_and_are_bounded(case: str, options: Any) -> None:
    """By each call what a loop makes, or a call with the concatenation; from few entries, from a sample,
    from all of err and of all entries."""
    for ratio in (0.01, 0.7, 1.0):
        grads, errs = lists(case, MIXED)
        plain, looped = copies(errs), copies(errs)
        payloads = gck.topk_ef_(grads, errs, ratio, **options)
        for grad, err, payload in zip(grads, looped, payloads, strict=True):
            assert_same(payload, gck.topk_ef_(grad, err, ratio, **options))
        assert all(same_bytes(a, b) for a, b in zip(errs, looped, strict=True))
        gck.topk_ef_(grads, plain, ratio)
        # Of ties there are no residuals; and where all is sent, none are left.
        if case != "ties" and ratio < 1:
            assert not all(same_bytes(a, b) for a, b in zip(errs, plain, strict=True))
        (grad, err), flat = (torch.cat([g.float() for g in grads]), torch.cat(errs)), copies(errs)
        assert_same(
            gck.topk_ef_(grads, flat, ratio, flat=True, **options),
            gck.topk_ef_(grad, err, ratio, **options),
        )
        assert same_bytes(torch.cat(flat), err)


def test_a_k_for_each() -> None:
    grads, errs = lists("gaussian")
    looped = copies(errs)
    ks = [7, 1, 2, 4097, 1, 500, 33, 60_000, 1]  # of an empty tensor nothing is kept, whatever is asked for
    payloads = gck.topk_ef_(grads, errs, k=ks)
    assert [payload.values.numel() for payload in payloads] == [0, 1, 2, 4097, 0, 500, 33, 60_000, 1]
    for grad, err, k, payload in zip(grads, looped, ks, payloads, strict=True):
        assert_same(payload, gck.topk_ef_(grad, err, k=k))


def test_payloads_share_one_buffer() -> None:
    payloads = gck.topk_ef_(*lists("gaussian"), 0.01)
    filled = [payload for payload in payloads if payload.numel]
    assert len({payload.values.untyped_storage().data_ptr() for payload in filled}) == 1
    for payload in filled:
        body = body_of(*payload.fields)
        assert body.numel() == payload.nbytes
        # Its padding is zero: the same bytes as those of a body made from copies.
        assert torch.equal(body, body_of(*(field.clone() for field in payload.fields)))


def test_nothing_at_all() -> None:
    assert gck.topk_ef_([], [], 0.1) == []
    assert gck.topk_ef_([], [], 0.1, flat=True).numel == 0
    empty = [torch.empty(0), torch.empty(0, dtype=torch.bfloat16)]
    errs = [torch.empty(0), torch.empty(0)]
    assert [payload.numel for payload in gck.topk_ef_(empty, errs, k=3)] == [0, 0]
    assert gck.topk_ef_(empty, errs, 0.1, flat=True).values.numel() == 0


def test_arrays_and_tuples() -> None:
    grads, errs = ([torch.arange(1.0, n + 1) for n in (3, 50)] for _ in range(2))
    arrays = tuple(err.numpy().copy() for err in errs)
    payloads = gck.topk_ef_(tuple(grad.numpy() for grad in grads), arrays, k=2)
    for grad, err, array, payload in zip(grads, errs, arrays, payloads, strict=True):
        assert_same(payload, gck.topk_ef_(grad, err, k=2))
        assert np.array_equal(array, err.numpy())


def good() -> tuple[list[Any], list[Any], dict[str, Any]]:
    return [torch.ones(300), torch.ones(20)], [torch.ones(300), torch.ones(20)], {}


def bad(which: str) -> tuple[list[Any], list[Any], dict[str, Any]]:
    grads, errs, options = good()
    memory = torch.ones(600)
    if which == "not both lists":
        return grads, errs[0], options
    if which == "lengths":
        return grads, errs[:1], options
    if which == "err dtype":
        errs[1] = errs[1].double()
    elif which == "grad dtype":
        grads[1] = grads[1].int()
    elif which == "numel":
        errs[1] = torch.ones(21)
    elif which == "strided":
        errs[0] = memory[::2]
    elif which == "recorded":
        grads[1].requires_grad_()
    elif which == "overlap":
        errs = [memory[:300], memory[290:310]]
    elif which == "k high":
        options = {"k": 21}
    elif which == "k of each":
        options = {"k": [1, 0]}
    elif which == "ks":
        options = {"k": [1, 2, 3]}
    elif which == "ks flat":
        options = {"k": [1, 2], "flat": True}
    elif which == "k flat":
        options = {"k": 321, "flat": True}
    elif which == "ratio":
        options = {"ratio": 1.5}
    elif which == "both":
        options = {"ratio": 0.1, "k": [1, 2]}
    elif which == "counter":
        options = {"nonfinite": torch.zeros(1)}
    elif which == "decay":
        options = {"decay": 1.5}
    elif which == "clip":
        options = {"clip": 0}
    elif which == "clip's dtype":
        options = {"clip": torch.ones(1, dtype=torch.int32)}
    elif which == "clip in err":
        options = {"clip": errs[1][3:4]}
    elif which == "stats":
        options = {"stats": gck.Statistics.empty()}
    elif which == "negated":
        errs[1] = torch._neg_view(errs[1])
    return grads, errs, options


BAD: dict[str, tuple[type[GckError], str]] = {
    "not both lists": (
        DtypeError,
        r"grad and err must both be lists, got err as a tensor of shape \(.*\), torch.float32, cpu",
    ),
    "lengths": (ShapeMismatchError, r"lists must be of one length, got 2 gradients and 1 residuals"),
    "err dtype": (DtypeError, r"err\[1\] must be float32, got torch\.float64"),
    "grad dtype": (DtypeError, r"grad\[1\] must be float32, bfloat16 or float16, got torch\.int32"),
    "numel": (ShapeMismatchError, r"err\[1\] must have as many elements as grad\[1\], got 21 and 20"),
    "strided": (LayoutError, r"err\[0\] must be contiguous, got shape \(300,\) with strides \(2,\)"),
    "recorded": (AutogradError, r"grad\[1\] requires grad in a recorded graph"),
    "overlap": (LayoutError, r"err\[0\] and err\[1\] overlap in memory"),
    "k high": (ArgumentError, r"grad\[1\]: k must be at most the number of elements 20, got 21"),
    "k of each": (ArgumentError, r"grad\[1\]: k must be at least 1, got 0"),
    "ks": (ArgumentError, r"k must be an int or 2 ints, without a ratio, got \[1, 2, 3\]"),
    "ks flat": (ArgumentError, r"k must be one int for a flat list, got \[1, 2\]"),
    "k flat": (ArgumentError, r"k must be at most the number of elements 320, got 321"),
    "ratio": (ArgumentError, r"ratio must be in \(0, 1\], got 1\.5"),
    "both": (ArgumentError, r"k must be an int or 2 ints, without a ratio, got \[1, 2\]"),
    "counter": (DtypeError, r"nonfinite must be int64, got torch\.float32"),
    "decay": (ArgumentError, r"decay must be in \(0, 1\], got 1\.5"),
    "clip": (ArgumentError, r"clip must be above 0, got 0"),
    "clip's dtype": (DtypeError, r"clip must be float32, got torch\.int32"),
    "clip in err": (LayoutError, r"err\[1\] and clip overlap in memory"),
    "stats": (ArgumentError, r"stats are of single tensors, got Statistics"),
    "negated": (LayoutError, r"err\[1\] is negated lazily, and cannot be written to"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_lists_change_nothing(which: str) -> None:
    error, text = BAD[which]
    grads, errs, options = bad(which)
    tensors = [*grads, *errs] if isinstance(errs, list) else grads
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(error, match=f"^topk_ef_: {text}"):
        gck.topk_ef_(grads, errs, **(options if {"ratio", "k"} & set(options) else options | {"ratio": 0.1}))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool, flat: bool) -> None:
    def step(grads: list[Tensor], errs: list[Tensor]) -> Any:
        return gck.topk_ef_(grads, errs, 0.1, flat=flat)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (100, 133):
        pairs = [make("gaussian", size, torch.float32) for size in (n, 2 * n)]
        grads, errs = [grad for grad, _ in pairs], [err for _, err in pairs]
        compiled_errs = copies(errs)
        got, wanted = compiled(grads, compiled_errs), step(grads, errs)
        for ours, theirs in [(got, wanted)] if flat else zip(got, wanted, strict=True):
            assert_same(ours, theirs)
        assert same_bytes(torch.cat(compiled_errs), torch.cat(errs))


def test_flat_is_for_lists() -> None:
    err = torch.ones(300)
    with pytest.raises(
        ArgumentError,
        match=r"flat is for lists of tensors, got it with a tensor of shape \(300,\), torch.float32, cpu",
    ):
        gck.topk_ef_(torch.ones(300), err, 0.1, flat=True)  # type: ignore[call-overload]
    assert torch.equal(err, torch.ones(300))


@pytest.mark.parametrize("flat", ["False", None, 1, torch.ones(2)], ids=["text", "None", "1", "tensor"])
def test_flat_is_a_bool(flat: Any) -> None:
    err = torch.ones(300)
    for grads, errs in (([torch.ones(300)], [err]), (torch.ones(300), err)):
        with pytest.raises(DtypeError, match="topk_ef_: flat must be a bool, got"):
            gck.topk_ef_(grads, errs, 0.1, flat=flat)  # type: ignore[call-overload]
    assert torch.equal(err, torch.ones(300))
