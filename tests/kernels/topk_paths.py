"""Top-k on the GPU's code, path by path: compares with the reference, and tells which path was taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from gck.kernels.topk import gpu, gpu_control, gpu_guess, gpu_kernels, reference
from tests.cases import Guarded, same_bytes

LIST, KNOWN, SCAN = (mode.value for mode in (gpu_control.LIST, gpu_control.KNOWN, gpu_control.SCAN))
SMALL = 4000 + 5  # elements, of the tiles of `shrink`: two runs of 8 tiles, the last of which is cut short
NEAR = 3  # LIST, where one level of the search was enough


def key_of(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32)) & 0x7FFFFFFF


def shrink(monkeypatch: pytest.MonkeyPatch, capacity: int | None = None) -> None:
    """Tiles, runs and groups so small, and a sample so dense, that a few thousand elements have several
    of each; and a list of a given capacity."""
    small = {"TILE": 256, "BLOCK": 32, "GROUP": 8, "FEWEST_RUNS": 1, "NEAR_ROOM": 128, "LINES": 16}
    small |= {"REFINE_SHAPES": {16: 8, 32: 4}, "EMIT_SHAPES": {16: 4, 32: 8}}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu_kernels, "LONG_SOURCE", tl.constexpr(512))
    monkeypatch.setattr(gpu_guess, "MIN_SAMPLED", 256)
    monkeypatch.setattr(gpu_guess, "SAMPLE_FRACTION", 2)
    if capacity is not None:
        monkeypatch.setattr(gpu_guess, "list_capacity", lambda n, k, lines, part: capacity)


def rows(n: int, width: int, spread: float) -> tuple[Tensor, Tensor]:
    """Rows of normal numbers, each with a scale of its own."""
    generator = torch.Generator().manual_seed(5)
    scales = (spread * torch.randn(-(-n // width), generator=generator)).exp()
    return torch.randn(n, generator=generator) * scales.repeat_interleave(width)[:n], torch.zeros(n)


def check(
    compressor: Any,
    grad: Tensor,
    err: Tensor,
    hint: int | None = None,
    device: str = "cpu",
    aligned: bool = False,
    seen: dict[str, int] | None = None,
) -> int:
    """Compresses between canaries, compares every byte with the reference, and returns the mode; `seen` takes
    what the control block has counted."""
    fields, new_err, cleared = reference.compress(compressor, grad, err)
    n = grad.numel()
    g, e = Guarded.of(grad.to(device)), Guarded.of(err.to(device))
    if aligned:
        g.inner, e.inner = g.inner.clone(), e.inner.clone()
    layout = compressor.layout(n)
    body = torch.zeros(1, layout.nbytes, dtype=torch.uint8, device=device)
    nonfinite = torch.full((1,), 5, dtype=torch.int64, device=device)
    last = None if hint is None else torch.tensor([hint], dtype=torch.int32, device=device)

    controls: list[Tensor] = []

    def spy(name: str) -> Any:
        make = getattr(torch, name)

        def made(*args: Any, **kwargs: Any) -> Tensor:
            controls.append(make(*args, **kwargs))
            return controls[-1]

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("zeros", "empty"):  # the control block comes first
            patch.setattr(torch, name, spy(name))
        gpu.compress_(compressor, g.inner, e.inner, body, nonfinite, last)

    for got, wanted in zip(layout.views(body[0]), fields, strict=True):
        assert same_bytes(got, wanted)
    assert same_bytes(e.inner, new_err)
    assert same_bytes(g.inner, grad)
    assert int(nonfinite) == 5 + cleared
    assert g.intact()
    assert e.intact()
    control = controls[0]
    if last is not None:
        acc = grad.float() + err
        keys = torch.where(acc.isnan(), torch.nan, acc).view(torch.int32) & 0x7FFFFFFF
        assert int(last) == int(keys.sort(descending=True).values[fields[0].numel() - 1])
    k = fields[0].numel()
    listed, ties = (int(control[word.value]) for word in (gpu_control.LISTED, gpu_control.TIES))
    if n < gpu.MOST_IN_HALF:
        tied = int(control[gpu_control.TIE.value]) > 0
        listed, ties = listed & gpu_control.HALF_MASK.value, (listed >> 32) * tied
    if seen is not None:
        words = {"long": gpu_control.LONG_TILES, "clustered": gpu_control.CLUSTERED}
        seen |= {name: int(control[word.value]) for name, word in words.items()}
        seen |= {"listed": listed, "close": int(control[gpu_control.LISTED.value]) >> 32}
        seen |= {"guess": int(control[gpu_control.GUESS.value])}
        seen |= {"stop": int(control[gpu_control.BRACKET_STOP.value])}
    capacity = (
        gpu_guess.list_capacity(n, k, gpu.sampled_lines(n, k), gpu.LINES) if gpu_guess.listing(n, k) else 0
    )
    if listed < k:
        return KNOWN if listed + ties >= k else SCAN
    second_level = control[gpu_control.HISTOGRAMS.value + gpu_control.BINS :][: gpu_control.BINS]
    return (LIST if second_level.any() else NEAR) if listed <= capacity else SCAN
