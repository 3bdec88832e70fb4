"""Rules of the house that no linter of ours can express."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gck

ROOT = Path(__file__).parent.parent
CORE = sorted(
    path
    for files in (
        "gck/*.py",
        "gck/error_feedback/*.py",
        "gck/message/*.py",
        "gck/ops/*.py",
        "kernels/**/*.py",
    )
    for path in ROOT.glob(files)
)
PACKAGE = sorted(p for folder in ("gck", "kernels", "collectives") for p in (ROOT / folder).rglob("*.py"))
# What re-exports or integrates may import more than the core does.
FACE = {ROOT / "gck/__init__.py"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_and_kernels_do_not_communicate(path: Path) -> None:
    if path not in FACE:
        assert not [name for name in imported(path) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_and_cupy_are_imported_by_gpu_modules_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top_level = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert "cupy" not in top_level
    if "triton" in top_level:
        assert path.name.startswith("gpu") or path.parent.name == "common"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_errors_quote_the_value_and_not_its_type_alone(path: Path) -> None:
    """See `gck.values.shown`. But never a communicator's unique_id, which would let others in."""
    refused = re.findall(r"\bgot [^\n]*\{type\((\w+)\)\.__name__\}", path.read_text())
    assert refused == (["unique_id"] if path.name == "nccl.py" else [])


def test_links() -> None:
    for name in ("kernels", "collectives"):
        assert (ROOT / "gck" / name).readlink() == Path("..") / name


def test_bindings_see_no_torch_header() -> None:
    sources = [p for p in (ROOT / "bindings").rglob("*") if p.suffix in (".cpp", ".hpp")]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if "torch" in line or "ATen" in line or "c10" in line], path


@pytest.mark.parametrize("folder", ["kernels", "collectives"])
def test_no_second_name(folder: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"import gck.{folder}, not {folder}" in run.stderr


def test_gpu_kernels_refuse_an_old_triton() -> None:
    pytest.importorskip("triton")
    code = "import triton; triton.__version__ = '3.5.1'; import gck.kernels.topk.gpu"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "ImportError: gck needs Triton 3.6, found 3.5.1" in run.stderr


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gck.__version__


def test_import_is_light() -> None:
    """Neither Triton nor what the command line and files need is loaded by `import gck`."""
    heavy = {"triton", "cupy", "rich", "typer", "matplotlib", "safetensors"}
    code = f"import sys, gck; print(*{heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""


def test_the_oldest_that_are_tested_are_the_oldest_that_are_admitted() -> None:
    """`make test-oldest` installs what the bounds of pyproject.toml say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints-oldest.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", constraints, re.MULTILINE))
    admitted = dict(dependency.split(">=") for dependency in project["dependencies"])
    assert {name: release(version) for name, version in admitted.items()} == {
        name: release(version) for name, version in tested.items()
    }


def release(version: str) -> tuple[int, ...]:
    numbers = tuple(map(int, version.split(".")))
    return numbers + (0,) * (3 - len(numbers))
