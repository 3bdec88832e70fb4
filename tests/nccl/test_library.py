"""Which library is opened, and what is said where none can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gck.collectives.transports.nccl_rendezvous import wheels
from tests.nccl.library import ROOT, fake_library
from tests.versions import needs_torch_without_nccl

OPEN = (
    "from gck.collectives.transports.nccl_rendezvous import nccl_library; print(*nccl_library(), sep='\\n')"
)


def run(code: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "GCK_NCCL_LIBRARY"}
    variables = kept | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in environment.items()}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)


def test_the_environment_chooses() -> None:
    library = fake_library()
    done = run(OPEN, GCK_NCCL_LIBRARY=library)
    assert done.stdout.split("\n")[:3] == ["2.32.3", str(library), "GCK_NCCL_LIBRARY"], done.stderr


@needs_torch_without_nccl
def test_one_that_is_loaded_comes_first() -> None:
    library = fake_library()
    done = run(f"import ctypes; ctypes.CDLL({str(library)!r})\n{OPEN}")
    assert done.stdout.split("\n")[1:3] == [str(library), "process"], done.stderr


def test_then_a_wheel_then_the_system(tmp_path: Path) -> None:
    package = tmp_path / "nvidia/nccl/lib"
    package.mkdir(parents=True)
    (tmp_path / "nvidia/nccl/__init__.py").touch()
    (package / "libnccl.so.2").symlink_to(fake_library())
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    from_wheel = run(OPEN, **paths)
    if not wheels():  # else the installed one is found first, or this one: both are right
        assert from_wheel.stdout.split("\n")[1:3] == [str(package / "libnccl.so.2"), "wheel"], (
            from_wheel.stderr
        )
        from_system = run(OPEN, LD_LIBRARY_PATH=package)
        assert from_system.stdout.split("\n")[2] == "system", from_system.stderr


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"GCK_NCCL_LIBRARY": "/nowhere/libnccl.so"},
            "GCK_NCCL_LIBRARY cannot be opened: /nowhere/libnccl.so",
        ),
        ({"FAKE_NCCL_VERSION": "21403"}, "is NCCL 2.14.3, older than 2.18.1"),
        ({"FAKE_NCCL_VERSION": "2708"}, "is NCCL 2.7.8, older than 2.18.1"),
    ],
)
def test_unusable_libraries(variables: dict[str, str], text: str) -> None:
    done = run(OPEN, **({"GCK_NCCL_LIBRARY": fake_library()} | variables))
    assert "BackendUnavailableError" in done.stderr
    assert text in done.stderr


def test_a_library_without_what_is_needed() -> None:
    done = run(OPEN, GCK_NCCL_LIBRARY=fake_library("FAKE_NCCL_WITHOUT_ABORT"))
    assert "lacks ncclCommAbort" in done.stderr


@pytest.mark.parametrize(
    ("macro", "call", "function"),
    [
        ("SPLIT", "comm.split(0)", "ncclCommSplit"),
        ("BROADCAST", "comm.broadcast(torch.ones(2))", "ncclBroadcast"),
        ("REDUCE_SCATTER", "comm.reduce_scatter(torch.ones(1, 2))", "ncclReduceScatter"),
    ],
)
def test_what_is_missing_fails_when_it_is_used(macro: str, call: str, function: str) -> None:
    code = f"""
import gck, torch
with gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=10) as comm:
    try:
        {call}
    except gck.errors.BackendUnavailableError as error:
        print(error)
    comm.barrier()
    print("usable")
"""
    done = run(code, GCK_NCCL_LIBRARY=fake_library(f"FAKE_NCCL_WITHOUT_{macro}"))
    assert f"lacks {function}" in done.stdout, done.stderr
    assert "usable" in done.stdout


@pytest.mark.skipif(bool(wheels()), reason="NCCL is installed here")
def test_none_at_all() -> None:
    done = run("import gck; gck.NcclCommunicator.create_unique_id()")
    assert "BackendUnavailableError: NCCL is not installed" in done.stderr
    assert "pip install nvidia-nccl-cu12" in done.stderr


DOCTOR = "from gck.cli.doctor import examine; print(*(f for f in examine() if 'NCCL' in f.name), sep='\\n')"


@pytest.mark.parametrize(
    ("macros", "variables", "text"),
    [
        ((), {}, "2.32.3, chosen by GCK_NCCL_LIBRARY"),
        ((), {"GCK_NCCL_LIBRARY": "/nowhere/libnccl.so"}, "cannot be opened"),
        ((), {"FAKE_NCCL_VERSION": "21403"}, "is NCCL 2.14.3, older than 2.18.1"),
        (("FAKE_NCCL_WITHOUT_ABORT",), {}, "lacks ncclCommAbort"),
    ],
)
def test_doctor_says_what_it_found(macros: tuple[str, ...], variables: dict[str, str], text: str) -> None:
    done = run(DOCTOR, **({"GCK_NCCL_LIBRARY": fake_library(*macros)} | variables))
    assert f"works={text.startswith('2.32.3')}" in done.stdout, done.stderr
    assert text in done.stdout


@pytest.mark.skipif(bool(wheels()), reason="NCCL is installed here")
def test_doctor_says_that_there_is_none() -> None:
    done = run(DOCTOR)
    assert "works=False" in done.stdout, done.stderr
    assert "NCCL is not installed" in done.stdout


@needs_torch_without_nccl
def test_doctor_counts_copies(tmp_path: Path) -> None:
    copy = Path(shutil.copy(fake_library(), tmp_path / "libnccl.so.2"))
    done = run(f"import ctypes; ctypes.CDLL({str(copy)!r}); {DOCTOR}", GCK_NCCL_LIBRARY=fake_library())
    assert "several in the process" in done.stdout, done.stderr
    assert str(copy) in done.stdout
