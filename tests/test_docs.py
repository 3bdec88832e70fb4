"""Every Python snippet in docs/ runs, one document after the other, each from the top; figures are drawn."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gck
from gck.compressor import REGISTRY, compressor_class
from tests.versions import needs_fsdp_hook

DOCS = Path(__file__).parent.parent / "docs"
ELSEWHERE = {"nccl.md", "frameworks.md"}  # need libraries and ranks: tests/nccl, test_frameworks.py


def snippets(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


# Each makes the picture of a page in docs/kernels that has its name.
FIGURES = [p for p in sorted((DOCS / "figures").glob("*.py")) if p.name != "drawing.py"]
LARGEST_FIGURE = 150_000  # bytes
DOCUMENTS = [p for p in sorted(DOCS.rglob("*.md")) if snippets(p) and p.name not in ELSEWHERE]
NEED = {"sharded.md": [needs_fsdp_hook]}


def test_there_are_some() -> None:
    assert len(DOCUMENTS) >= 4


def test_rows_of_tables_have_all_cells() -> None:
    for path in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
            cells = {row: len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(set(cells.values())) == 1, f"{path.name}: {cells}"


def test_methods_of_compressors_exist() -> None:
    kinds = [compressor_class(name) for name in REGISTRY]
    named = {
        (path.name, name)
        for path in (DOCS.parent / "README.md", *DOCS.rglob("*.md"))
        for name in re.findall(r"`compressor\.(\w+)", path.read_text())
    }
    assert named
    assert [place for place in named if not any(hasattr(kind, place[1]) for kind in kinds)] == []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=NEED.get(path.name, ())) for path in DOCUMENTS]
)
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a reader has at hand: a gradient, residuals, and a process group of one rank."""
    monkeypatch.chdir(tmp_path)
    n = 10_000
    scope: dict[str, Any] = {"gck": gck, "torch": torch, "dataclasses": dataclasses}
    scope |= {"grad": torch.randn(n), "err": torch.zeros(n), "x": torch.randn(n)}
    scope |= {"server_err": torch.zeros(gck.shard_numel(n, 256, 1))}
    scope |= {
        "step": 3,
        "rank": 0,
        "world_size": 1,
        "compressor": gck.Quantize(rounding="stochastic", seed=0),
    }
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for snippet in snippets(path):
            exec(snippet, scope)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("script", FIGURES, ids=lambda path: path.stem)
def test_figures_can_be_drawn(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    for folder in (tmp_path, DOCS / "kernels"):
        picture = (folder / f"{script.stem}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < LARGEST_FIGURE
    page = (DOCS / f"kernels/{script.stem}.md").read_text()
    assert re.search(rf"!\[[^\]]{{20,}}\]\({script.stem}\.png\)", page)
    assert f"`python docs/figures/{script.name}`" in page
