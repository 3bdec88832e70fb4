"""Random-k in Triton's interpreter: tiles and strata that cut each other, and indices past 2**32."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import pytest
import torch

from gck.kernels.random_k import RandomK, Unbiased, reference
from tests.cases import GRAD_DTYPES, make
from tests.contract import check_case
from tests.kernels.launches import recorded

if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU here", allow_module_level=True)

import triton
import triton.language as tl

from gck.kernels.random_k import gpu
from gck.kernels.random_k.gpu_ring import Ring, entry_of, rank_of, stratum_of, widened


@pytest.mark.parametrize("value_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 40, 700, 1200])
def test_tiles_and_strata(k: int, value_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strata longer and shorter than tiles, in vectors of several tiles; entries in several turns."""
    monkeypatch.setattr(gpu, "TILE", 512)
    monkeypatch.setattr(gpu, "SLOTS", 128)
    monkeypatch.setattr(gpu, "SPOIL_BLOCK", 256)
    for seed, case in enumerate(("gaussian", "few nonfinite", "nonfinite", "huge")):
        kind = RandomK if seed % 2 else Unbiased
        compressor = kind(k=k, seed=seed - 2, value_dtype=value_dtype)
        check_case(compressor, "interpreter", *make(case, 1200 + 49 * seed, GRAD_DTYPES[seed % 3]))


@triton.jit
def places_kernel(
    p_elements, p_ranks, p_strata, numel, k, size, longer, rotation, first, key_0, key_1, block: tl.constexpr
):
    ring = widened((numel, k, size, longer, rotation, first, key_0, key_1))
    b_stratum = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    b_element = entry_of(b_stratum, ring)
    tl.store(p_elements + b_stratum, b_element, mask=b_stratum < k)
    tl.store(p_ranks + b_stratum, rank_of(b_stratum, ring), mask=b_stratum < k)
    tl.store(p_strata + b_stratum, stratum_of(b_element, ring), mask=b_stratum < k)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 12])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (97, 97), (97, 10), (2**31 + 11, 300), (2**40 + 7, 301), (2**61 - 1, 1), (2**61, 64)]
)
def test_indices(n: int, k: int, seed: int) -> None:
    elements, ranks, strata = (torch.full((k,), -1, dtype=torch.int64) for _ in range(3))
    places_kernel[(triton.cdiv(k, 64),)](elements, ranks, strata, *Ring.of(seed, n, k), block=64)
    assert torch.equal(strata, torch.arange(k))
    assert elements[ranks.argsort()].tolist() == reference.indices(seed, n, k)
    assert torch.equal(ranks.sort().values, torch.arange(k))


def test_launches_do_not_depend_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grids and options for any values and seeds, and contraction pinned off."""
    runs = []
    for case, seed in (("gaussian", 1), ("all nan", 2**63 - 1), ("all zero", -1)):
        compressor = RandomK(ratio=0.1, seed=seed)
        grad, err = make(case, 5000, torch.float32)
        body = torch.zeros(1, compressor.layout(5000).nbytes, dtype=torch.uint8)
        fields = compressor.layout(5000).views(body[0])

        def run(
            arguments: tuple[Any, ...] = (compressor, grad, err, body, None), fields: Any = fields
        ) -> None:
            gpu.compress_(*arguments)
            gpu.decompress_(arguments[0], arguments[2], fields, 1.0, True)

        runs.append([(fn.__name__, grid, kwargs) for fn, grid, kwargs in recorded(monkeypatch, run)])
    assert [name for name, _, _ in runs[0]] == ["compress_kernel", "spoil_kernel", "decompress_kernel"]
    assert runs[0] == runs[1] == runs[2]
    assert all(options["enable_fp_fusion"] is False for _, _, options in runs[0])
