"""Our declarations of NCCL's ABI are those of the real nccl.h."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gck.collectives.transports.nccl_rendezvous import wheels
from tests.nccl.library import HEADERS, ROOT, compiler

VENDORED = ["2.18.1", "2.32.3"]


def compile_against(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [compiler(), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags]
    command += [f"-I{path}" for path in (ROOT / "bindings", HEADERS / "cuda", folder)]
    return subprocess.run([*command, str(ROOT / "tests/nccl/abi.cpp")], capture_output=True, text=True)


@pytest.mark.parametrize("version", VENDORED)
def test_declarations_match(version: str) -> None:
    done = compile_against(HEADERS / version)
    assert done.returncode == 0, done.stderr


def test_declarations_match_the_installed_wheel() -> None:
    folders = [Path(library).parents[1] / "include" for library in wheels()]
    folders = [folder for folder in folders if (folder / "nccl.h").exists()]
    if not folders:
        pytest.skip("no nvidia-nccl wheel is installed")
    for folder in folders:
        done = compile_against(folder)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("ncclRemoteError             =  6", "ncclRemoteError             =  9"),
        ("ncclFloat32    = 7", "ncclFloat32    = 17"),
        ("  int splitShare;\n", "  int other; int splitShare;\n"),
        ("#define NCCL_UNIQUE_ID_BYTES 128", "#define NCCL_UNIQUE_ID_BYTES 256"),
        ("ncclCommAbort(ncclComm_t comm);", "ncclCommAbort(ncclComm_t comm, int flags);"),
    ],
)
@pytest.mark.parametrize("version", VENDORED)
def test_a_difference_is_found(version: str, wrong: str, right: str, tmp_path: Path) -> None:
    text = (HEADERS / version / "nccl.h").read_text()
    assert wrong in text
    (tmp_path / "nccl.h").write_text(text.replace(wrong, right))
    done = compile_against(tmp_path)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr
