"""sdist -> wheel -> a new environment, without a package index; then it must work from anywhere."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

# One worker builds the wheel, once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).parent.parent

CHECK = """
import torch, gck
from gck._native import load
grad, err = torch.randn(100_000), torch.zeros(100_000)
payload = gck.topk_ef_(grad, err, 0.01)
assert payload.values.numel() == 1000
assert torch.equal(gck.decompress(payload) + err, grad)
print(load().__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("gck-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    # The environment of the tests has the optimised build, which takes three times as long.
    debug = ("-C", "cmake.build-type=Debug", "-C", "cmake.define.CMAKE_CXX_FLAGS_DEBUG=-O0")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", *debug, "-w", out, sdist, cwd=out)
    return next(out.glob("gck-*.whl"))


def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "kernels/topk/reference.py",
        "bindings/cpu/topk.cpp",
        "collectives/two_phase.py",
        "LICENSE",
    } <= names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"gck/kernels/topk/gpu.py", "gck/collectives/two_phase.py", "gck/_C.pyi", "gck/py.typed"} <= set(
        names
    )
    assert [name for name in names if name.startswith("gck/_C.") and name.endswith(".so")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gck"}


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # torch and the rest come from this environment: as a plain folder, so that its editable gck does not.
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    assert str(site) in run(python, "-c", CHECK, cwd=tmp_path)
    assert '"cpu_path_works": true' in run(tmp_path / "venv/bin/gck", "doctor", "--json", cwd=tmp_path)
