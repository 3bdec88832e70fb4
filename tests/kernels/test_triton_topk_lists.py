"""Top-k of lists of tensors in Triton's interpreter: the bytes of a loop, or of the concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from tests.cases import CASES, GRAD_DTYPES, Guarded, make, same_bytes

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

from gck.kernels.common.tables import KeptTables
from gck.kernels.topk import gpu, gpu_guess, gpu_lists, gpu_tables, reference
from gck.kernels.topk.lists import bodies_of
from tests.kernels.launches import recorded


def shrink(monkeypatch: pytest.MonkeyPatch, capacity: int | None = None) -> None:
    """So small that a few thousand elements have several tiles, runs, groups and parts."""
    for module in (gpu_lists, gpu_tables):
        monkeypatch.setattr(module, "TILE", 256)
        monkeypatch.setattr(module, "GROUP", 16)
    monkeypatch.setattr(gpu_lists, "BLOCK", 32)
    monkeypatch.setattr(gpu_tables, "LONG_RUNS_FROM", 5)
    monkeypatch.setattr(gpu_tables, "PART_TILES", 3)
    monkeypatch.setattr(gpu_tables, "_plans", KeptTables())
    monkeypatch.setattr(gpu_guess, "MIN_SAMPLED", 512)
    monkeypatch.setattr(gpu_guess, "SAMPLE_FRACTION", 2)
    if capacity is not None:
        monkeypatch.setattr(gpu_guess, "list_capacity", lambda n, k, lines: min(n, capacity))


def tensors(cases: Sequence[tuple[str, int, torch.dtype]]) -> tuple[list[Tensor], list[Tensor]]:
    made = [make(case, n, dtype) if n else (torch.empty(0, dtype=dtype), torch.empty(0))
            for case, n, dtype in cases]  # fmt: skip
    return [grad for grad, _ in made], [err for _, err in made]


def guarded(xs: Sequence[Tensor], aligned: bool) -> list[Guarded]:
    made = [Guarded.of(x) for x in xs]
    if aligned:
        for x in made:
            x.inner = x.inner.clone()
    return made


def clip_of(compressor: Any) -> Tensor | None:
    return None if compressor.clip is None else torch.tensor([compressor.clip])


def check_list(
    compressors: list[Any], grads: list[Tensor], errs: list[Tensor], aligned: bool = False
) -> None:
    wanted = [reference.compress(*one) for one in zip(compressors, grads, errs, strict=True)]
    g, e = guarded(grads, aligned), guarded(errs, aligned)
    numels = [grad.numel() for grad in grads]
    counts = [c.layout(n).fields[0].count for c, n in zip(compressors, numels, strict=True)]
    bodies = bodies_of(numels, counts, compressors[0].value_dtype)
    memory = torch.zeros(bodies.nbytes, dtype=torch.uint8)
    nonfinite = torch.full((1,), 5, dtype=torch.int64)
    one, clip = compressors[0], clip_of(compressors[0])
    gpu.compress_list_(bodies, [x.inner for x in g], [x.inner for x in e], memory, nonfinite, one.decay, clip)
    values, indices = bodies.fields(memory)
    for i, (fields, new_err, _) in enumerate(wanted):
        assert same_bytes(values[i], fields[0]), i
        assert same_bytes(indices[i], fields[1]), i
        assert same_bytes(e[i].inner, new_err), i
        assert same_bytes(g[i].inner, grads[i]), i
        assert g[i].intact()
        assert e[i].intact()
    assert int(nonfinite) == 5 + sum(cleared for _, _, cleared in wanted)


def check_flat(compressor: Any, grads: list[Tensor], errs: list[Tensor], aligned: bool = False) -> None:
    fields, new_err, cleared = reference.compress(
        compressor, torch.cat([grad.float() for grad in grads]), torch.cat(errs)
    )
    g, e = guarded(grads, aligned), guarded(errs, aligned)
    layout = compressor.layout(sum(grad.numel() for grad in grads))
    bodies = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    nonfinite = torch.full((1,), 5, dtype=torch.int64)
    clip = clip_of(compressor)
    gpu.compress_flat_(compressor, [x.inner for x in g], [x.inner for x in e], bodies, nonfinite, clip)
    for got, field in zip(layout.views(bodies[0]), fields, strict=True):
        assert same_bytes(got, field)
    assert same_bytes(torch.cat([x.inner for x in e]), new_err)
    assert int(nonfinite) == 5 + cleared
    assert all(x.intact() for x in [*g, *e])


SIZES = (1300, 1, 0, 700, 256, 17, 3000)


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_by_itself(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    turn = list(CASES).index(case)
    dtype = GRAD_DTYPES[turn % 3]
    ks = [max(1, n // (3, 7, 40)[(turn + i) % 3]) for i, n in enumerate(SIZES)]
    compressors = [gck.TopK(k=k, value_dtype=GRAD_DTYPES[turn // 2 % 3]) for k in ks]
    check_list(compressors, *tensors([(case, n, dtype) for n in SIZES]), aligned=turn % 2 == 0)


@pytest.mark.parametrize("case", CASES)
def test_all_tensors_together(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    turn = list(CASES).index(case)
    data = tensors([(case, n, GRAD_DTYPES[turn % 3]) for n in SIZES])
    k = (1, 60, 1200, sum(SIZES))[turn % 4]
    check_flat(gck.TopK(k=k, value_dtype=GRAD_DTYPES[turn // 2 % 3]), *data, aligned=turn % 2 == 1)


def test_gradients_of_several_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    mixed = [("gaussian", n, GRAD_DTYPES[i % 3]) for i, n in enumerate(SIZES)]
    check_list([gck.TopK(k=max(1, n // 30)) for n in SIZES], *tensors(mixed))
    check_flat(gck.TopK(k=150), *tensors(mixed))


def test_each_tensor_in_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, known by its ties, overflown, and too small for a list, side by side."""
    shrink(monkeypatch, 700)
    grads, errs = tensors([("gaussian", 2000, torch.float32), ("nonfinite", 2000, torch.float32)])
    for grad in (torch.ones(2000), make("gaussian", 300, torch.float32)[0], torch.full((900,), math.nan)):
        grads.append(grad)
        errs.append(torch.zeros(grad.numel()))
    check_list([gck.TopK(k=k) for k in (100, 400, 333, 50, 30)], grads, errs)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"decay": 0.5, "clip": 0.25}, {"clip": 1e-3}], ids=str)
def test_residuals_that_fade_and_are_bounded(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, known by ties, and out of room for a list."""
    for case, capacity in (("gaussian", None), ("few nonfinite", 700), ("ties", None)):
        shrink(monkeypatch, capacity)
        mixed = tensors([(case, n, GRAD_DTYPES[i % 3]) for i, n in enumerate(SIZES)])
        check_list([gck.TopK(k=max(1, n // 30), **options) for n in SIZES], *mixed)
        for k in (150, 1200):
            check_flat(gck.TopK(k=k, **options), *mixed)


def test_large_entries_in_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All winners, and more ties than win, come from tensors in the middle."""
    shrink(monkeypatch)
    grads = [torch.full((600,), 0.5), torch.full((1100,), 3.0), torch.full((400,), 0.5), torch.ones(900)]
    errs = [torch.zeros(grad.numel()) for grad in grads]
    for k in (5, 600, 1101, 2100):
        check_flat(gck.TopK(k=k), grads, errs)


def test_lists_of_nothing() -> None:
    nothing, empty = torch.empty(0, dtype=torch.uint8), [torch.empty(0)] * 2
    gpu.compress_list_(bodies_of([], [], torch.float32), [], [], nothing, None)
    gpu.compress_list_(bodies_of([0, 0], [0, 0], torch.float32), empty, empty, nothing, None)
    gpu.compress_flat_(gck.TopK(k=1), empty, empty, torch.empty(1, 0, dtype=torch.uint8), None)


def test_plans_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By addresses, sizes, dtypes and choices, and the oldest is forgotten first."""
    monkeypatch.setattr(gpu_tables, "_plans", KeptTables(2))
    grads, errs = [torch.zeros(10), torch.zeros(20)], [torch.zeros(10), torch.zeros(20)]
    choices = [gpu_tables.Choice(1, 1, 0, 0), gpu_tables.Choice(2, 1, 16, 32)]
    first = gpu_tables.plan_for(grads, errs, choices)
    assert gpu_tables.plan_for(grads, errs, choices) is first
    assert gpu_tables.plan_for(errs, grads, choices) is not first
    assert gpu_tables.plan_for(grads, errs, choices) is first
    assert gpu_tables.plan_for(grads, errs, [gpu_tables.Choice(3, 2, 0, 0)]) is not first
    assert gpu_tables.plan_for(grads, errs, choices) is first
    assert len(gpu_tables._plans) == 2


def test_plans_are_made_on_the_host_whatever_the_default_device_is() -> None:
    tensors = [torch.zeros(10)]
    torch.set_default_device("meta")
    try:
        plan = gpu_tables.plan_for(tensors, tensors, [gpu_tables.Choice(1, 1, 0, 0)])
    finally:
        torch.set_default_device(None)
    assert {plan.host.device.type, plan.tensors.device.type, plan.tensor_of_tile.device.type} == {"cpu"}


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many for forty tensors as for two, and contraction pinned off."""
    counts = []
    for count in (2, 40):
        data = tensors([("gaussian", 40 + i, torch.float32) for i in range(count)])
        compressors = [gck.TopK(k=3)] * count
        with pytest.MonkeyPatch.context() as patch:
            launches = recorded(patch, lambda c=compressors, d=data: check_list(c, *d))
        assert all(kwargs["enable_fp_fusion"] is False for _, _, kwargs in launches)
        counts.append([fn.__name__ for fn, _, _ in launches])
    assert counts[0] == counts[1]
