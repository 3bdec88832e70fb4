"""Top-k on a GPU: every mode on large vectors, hints, graphs whose data changes the mode, sums, lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from bench import inputs
from tests.cases import GRAD_DTYPES, make, same_bytes

pytest.importorskip("triton")

from gck.kernels.topk import gpu, gpu_tables, reference
from gck.kernels.topk.lists import bodies_of
from tests.kernels.test_gpu import HUGE, body_of, needs_memory, synchronisation_is_an_error
from tests.kernels.topk_paths import KNOWN, LIST, NEAR, SCAN, check, key_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

N = 1_500_007


def embedding(n: int) -> tuple[Tensor, Tensor]:
    """A few rows are not zero."""
    grad = torch.zeros(n)
    rows = torch.arange(n) % 64 < 3
    grad[rows] = torch.randn(int(rows.sum()), generator=torch.Generator().manual_seed(0))
    return grad, torch.zeros(n)


def tied(n: int) -> tuple[Tensor, Tensor]:
    """More elements of one value than are set apart; k reaches into them."""
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0))
    grad[::60] = 3.0
    return grad, torch.zeros(n)


EITHER = -1  # LIST, after one level of the search or more: a bin may have more than are set apart
MODES: dict[str, tuple[Callable[[int], tuple[Tensor, Tensor]], float, int | None, int]] = {
    "list": (lambda n: make("gaussian", n, torch.float32), 0.01, None, NEAR),
    "few of many": (lambda n: make("clustered", n, torch.float32), 0.001, None, NEAR),
    "many of many": (lambda n: make("gaussian", n, torch.float32), 0.1, None, EITHER),
    "beside each other": (lambda n: make("sorted", n, torch.float32), 0.01, None, EITHER),
    "ties": (tied, 0.01, None, LIST),
    "above the bracket": (lambda n: make("gaussian", n, torch.float32), 0.01, key_of(2.6), LIST),
    "constant": (lambda n: (torch.ones(n), torch.zeros(n)), 0.01, None, KNOWN),
    "zeros": (lambda n: make("minus zero", n, torch.float32), 0.01, None, KNOWN),
    "embedding": (embedding, 0.1, None, KNOWN),
    "guess too high": (lambda n: make("gaussian", n, torch.float32), 0.01, key_of(4.0), SCAN),
    "guess far too high": (lambda n: make("gaussian", n, torch.float32), 0.01, key_of(1e30), SCAN),
    "overflow": (lambda n: make("gaussian", n, torch.float32), 0.01, key_of(0.5), SCAN),
    "overflow everywhere": (lambda n: make("few nonfinite", n, torch.float32), 0.01, 1, SCAN),
    "infinite": (lambda n: (torch.full((n,), torch.inf), torch.zeros(n)), 0.01, None, SCAN),
    "most entries": (lambda n: make("gaussian", n, torch.float32), 0.5, None, SCAN),
}


@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, aligned: bool, value_dtype: torch.dtype) -> None:
    data, ratio, hint, wanted = MODES[mode]
    for n in (N, 40 * 2**20):
        compressor = gck.TopK(ratio=ratio, value_dtype=value_dtype)
        if n < 2**22 or value_dtype == torch.float32:
            got = check(compressor, *data(n), hint=hint, device="cuda", aligned=aligned)
            assert got == wanted or (wanted == EITHER and got in (LIST, NEAR))


@pytest.mark.parametrize("name", inputs.INPUTS)
def test_hard_inputs(name: str) -> None:
    grad, err = inputs.make(name, N)
    for ratio in (inputs.DENSITY, 0.1):
        check(gck.TopK(ratio=ratio), grad, err, device="cuda")
    check(gck.TopK(ratio=inputs.DENSITY, value_dtype=torch.bfloat16), grad.bfloat16(), err, device="cuda")


@pytest.mark.parametrize("hint", [-(2**31), -1, 0, 1, 0x7F800000, 0x7F800001, 0x7FFFFFFF, key_of(1.0)])
def test_no_hint_changes_the_result(hint: int) -> None:
    for case in ("gaussian", "nonfinite", "all zero"):
        check(gck.TopK(ratio=0.01), *make(case, N, torch.float32), hint=hint, device="cuda")


def test_a_hint_follows_the_threshold_of_each_step() -> None:
    compressor, hint = gck.TopK(ratio=0.01), torch.zeros(1, dtype=torch.int32, device="cuda")
    wanted_err = torch.zeros(N)
    err, body = wanted_err.cuda(), body_of(compressor, N)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(N, generator=generator)
        gpu.compress_(compressor, grad.cuda(), err, body, None, hint)
        fields, wanted_err, _ = reference.compress(compressor, grad, wanted_err)
        assert int(hint) == int((fields[0].view(torch.int32) & 0x7FFFFFFF).min())
        assert same_bytes(compressor.layout(N).views(body[0])[1], fields[1])
        assert same_bytes(err, wanted_err)


@pytest.mark.parametrize("hinted", [False, True])
def test_a_graph_replays_whatever_the_mode(hinted: bool) -> None:
    compressor = gck.TopK(ratio=0.02, value_dtype=torch.bfloat16)
    grad, err = torch.empty(N, device="cuda"), torch.zeros(N, device="cuda")
    body = body_of(compressor, N)
    hint = torch.zeros(1, dtype=torch.int32, device="cuda") if hinted else None

    def step() -> None:
        gpu.compress_(compressor, grad, err, body, None, hint)

    grad.normal_()
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    err.zero_()
    wanted_err = torch.zeros(N)
    for case in (
        "gaussian",
        "all equal",
        "gaussian",
        "all zero",
        "huge",
        "denormal",
        "nonfinite",
        "periodic",
    ):
        fresh, _ = make(case, N, torch.float32)
        grad.copy_(fresh)
        graph.replay()
        fields, wanted_err, _ = reference.compress(compressor, fresh, wanted_err)
        for got, wanted in zip(compressor.layout(N).views(body[0]), fields, strict=True):
            assert same_bytes(got, wanted), case
        assert same_bytes(err, wanted_err), case


@pytest.mark.parametrize("ranks", [1, 2, 8, 33])
@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
def test_sum_is_row_by_row(value_dtype: torch.dtype, ranks: int) -> None:
    for n, ratio in ((1000, 1.0), (N, 0.01), (N, 0.2)):
        compressor = gck.TopK(ratio=ratio, value_dtype=value_dtype)
        layout = compressor.layout(n)
        bodies = torch.zeros(ranks, layout.nbytes, dtype=torch.uint8, device="cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        for body in bodies:
            grad = torch.randn(n, device="cuda", generator=generator)
            gpu.compress_(compressor, grad, torch.zeros_like(grad), body.unsqueeze(0), None)
        base = torch.randn(n, device="cuda", generator=generator)
        for accumulate in (False, True):
            wanted = base.clone() if accumulate else torch.zeros(n, device="cuda")
            for body in bodies:
                gpu.decompress_(compressor, wanted, layout.views(body), -0.3, True)
            for _ in range(5):  # races would show as a difference between runs
                out = base.clone() if accumulate else torch.full((n,), torch.nan, device="cuda")
                gpu.decompress_sum_(compressor, out, bodies, layout, -0.3, accumulate)
                assert same_bytes(out, wanted)


def test_hostile_indices_stay_in_bounds() -> None:
    compressor, n = gck.TopK(k=5000), 100_000
    layout = compressor.layout(n)
    bodies = torch.zeros(8, layout.nbytes, dtype=torch.uint8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for body in bodies:
        values, indices = layout.views(body)
        values.fill_(1.0)
        indices.random_(-(2**31), 2**31 - 1, generator=generator)
        indices[::3].random_(-2 * n, 2 * n, generator=generator)
    whole = torch.full((3 * n,), 7.0, device="cuda")
    gpu.decompress_sum_(compressor, whole[n : 2 * n], bodies, layout, 1.0, True)
    assert bool((whole[:n] == 7.0).all())
    assert bool((whole[2 * n :] == 7.0).all())


SHAPES = [1, 768, 768 * 3, 768 * 768, 50257 * 64, 4096, 65_536, 65_537, 4095, 2**20]


def list_of(case: str, dtypes: tuple[torch.dtype, ...]) -> tuple[list[Tensor], list[Tensor]]:
    made = [make(case, n, dtypes[i % len(dtypes)]) for i, n in enumerate(SHAPES)]
    return [grad for grad, _ in made], [err for _, err in made]


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"decay": 0.5, "clip": 0.25}], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), GRAD_DTYPES], ids=str)
@pytest.mark.parametrize("case", ["gaussian", "ties", "nonfinite", "all zero", "clustered"])
def test_lists(case: str, dtypes: tuple[torch.dtype, ...], options: Any) -> None:
    grads, errs = list_of(case, dtypes)
    compressors = [gck.TopK(k=max(1, n // 100), **options) for n in SHAPES]
    bodies = bodies_of(SHAPES, [max(1, n // 100) for n in SHAPES], torch.float32)
    memory = torch.zeros(bodies.nbytes, dtype=torch.uint8, device="cuda")
    g, e = [x.cuda() for x in grads], [x.cuda() for x in errs]
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")
    clip = torch.tensor([options["clip"]], device="cuda") if "clip" in options else None
    gpu.compress_list_(bodies, g, e, memory, nonfinite, options.get("decay", 1.0), clip)
    values, indices = bodies.fields(memory)
    total = 0
    for i, compressor in enumerate(compressors):
        fields, new_err, cleared = reference.compress(compressor, grads[i], errs[i])
        total += cleared
        assert same_bytes(values[i], fields[0]), i
        assert same_bytes(indices[i], fields[1]), i
        assert same_bytes(e[i], new_err), i
    assert int(nonfinite) == total

    flat = gck.TopK(ratio=0.01, **options)
    body = body_of(flat, sum(SHAPES))
    e = [x.cuda() for x in errs]
    gpu.compress_flat_(flat, g, e, body, None, clip)
    fields, new_err, _ = reference.compress(flat, torch.cat([x.float() for x in grads]), torch.cat(errs))
    for got, wanted in zip(flat.layout(sum(SHAPES)).views(body[0]), fields, strict=True):
        assert same_bytes(got, wanted)
    assert same_bytes(torch.cat(e), new_err)


@pytest.mark.parametrize("warm", [True, False])
def test_lists_in_a_graph(warm: bool) -> None:
    """With tables that are there before, and with tables that each replay copies."""
    grads, errs = list_of("gaussian", (torch.float32,))
    flat = gck.TopK(ratio=0.01)
    n = sum(SHAPES)
    g, e, body = [x.cuda() for x in grads], [x.cuda() for x in errs], body_of(flat, n)

    def step() -> None:
        gpu.compress_flat_(flat, g, e, body, None)

    step()  # compiles
    if not warm:
        gpu_tables._plans.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gpu_tables._plans.clear()
    wanted_err = torch.cat(errs)
    for residual, old in zip(e, errs, strict=True):
        residual.copy_(old)
    for case in ("gaussian", "all equal", "nonfinite", "clustered"):
        fresh, _ = list_of(case, (torch.float32,))
        for x, new in zip(g, fresh, strict=True):
            x.copy_(new)
        graph.replay()
        fields, wanted_err, _ = reference.compress(flat, torch.cat(fresh), wanted_err)
        for got, wanted in zip(flat.layout(n).views(body[0]), fields, strict=True):
            assert same_bytes(got, wanted), case
        assert same_bytes(torch.cat(e), wanted_err), case


def test_no_host_synchronisation() -> None:
    compressor = gck.TopK(ratio=0.01)
    grads, errs = list_of("few nonfinite", GRAD_DTYPES)
    g, e = [x.cuda() for x in grads], [x.cuda() for x in errs]
    n = sum(SHAPES)
    layout, out = compressor.layout(n), torch.zeros(n, device="cuda")
    flat = torch.cat([x.float() for x in g])
    residual, hint = torch.zeros_like(flat), torch.zeros(1, dtype=torch.int32, device="cuda")
    bodies = torch.zeros(3, layout.nbytes, dtype=torch.uint8, device="cuda")

    def step() -> None:
        gpu.compress_(compressor, flat, residual, bodies[:1], None, hint)
        gpu.compress_flat_(compressor, g, e, bodies[1:2], None)
        gpu.decompress_sum_(compressor, out, bodies, layout, 0.5, False)

    step()  # compiles, and makes the tables
    with synchronisation_is_an_error():
        step()


def test_the_same_bytes_every_time() -> None:
    """Races would show as a difference between runs."""
    compressor = gck.TopK(ratio=0.05)
    for case in ("gaussian", "ties", "all equal"):
        grad, err = (x.cuda() for x in make(case, 5_000_011, torch.float32))
        runs = []
        for _ in range(20):
            e, body = err.clone(), body_of(compressor, grad.numel())
            gpu.compress_(compressor, grad, e, body, None)
            runs.append((e, body))
        assert all(same_bytes(e, runs[0][0]) and same_bytes(body, runs[0][1]) for e, body in runs)


def spikes() -> tuple[Tensor, Tensor]:
    """200 places past and before 2**31, and heights."""
    places = torch.cat([torch.arange(100), torch.arange(HUGE - 100, HUGE)])
    return places, torch.randperm(200, generator=torch.Generator().manual_seed(0)).float() + 1


@pytest.mark.xdist_group("huge")
def test_ties_past_2_31_elements() -> None:
    """More entries than are not zero: the rest are the first zeros."""
    needs_memory(40)
    places, heights = spikes()
    grad = torch.zeros(HUGE, dtype=torch.bfloat16, device="cuda")
    grad[places.cuda()] = heights.cuda().bfloat16()
    err = torch.zeros(HUGE, device="cuda")
    compressor = gck.TopK(k=250)
    body = body_of(compressor, HUGE)
    gpu.compress_(compressor, grad, err, body, None)
    values, indices = (field.cpu() for field in compressor.layout(HUGE).views(body[0]))
    assert torch.equal(indices, torch.cat([torch.arange(150), places[100:]]))
    assert torch.equal(values, torch.cat([heights[:100], torch.zeros(50), heights[100:]]))
    assert not err.any()
    layout = compressor.layout(HUGE)
    gpu.decompress_sum_(compressor, err, body.expand(2, -1).contiguous(), layout, 1.0, False)
    assert torch.equal(err[places.cuda()].cpu(), 2 * heights)
    assert int(err.count_nonzero()) == 200


@pytest.mark.xdist_group("huge")
def test_a_flat_list_past_2_31_elements() -> None:
    needs_memory(40)
    places, heights = spikes()
    grad = torch.zeros(HUGE, dtype=torch.bfloat16, device="cuda")
    grad[places.cuda()] = heights.cuda().bfloat16()
    err = torch.zeros(HUGE, device="cuda")
    compressor = gck.TopK(k=120)
    body = body_of(compressor, HUGE)
    cuts = [2**30 + 5, 2**30 - 4096, HUGE - 2**31 + 4091]
    gpu.compress_flat_(compressor, list(grad.split(cuts)), list(err.split(cuts)), body, None)
    values, indices = (field.cpu() for field in compressor.layout(HUGE).views(body[0]))
    wins = heights > 80
    assert torch.equal(indices, places[wins])
    assert torch.equal(values, heights[wins])
    assert int(err.count_nonzero()) == 80
