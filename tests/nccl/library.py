"""The fake libnccl.so.2, built once for each state of its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from hashlib import blake2b
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "tests/nccl_headers"
SOURCES = sorted((ROOT / "tests/nccl/fake").glob("*.?pp"))


def compiler() -> str:
    """A C++ compiler; skips the test where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("needs a C++ compiler")


def fake_library(*definitions: str) -> Path:
    """Path of the library, built with these macros."""
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-D{definition}" for definition in definitions]
    flags += [f"-I{HEADERS / 'cuda'}", f"-I{HEADERS / '2.32.3'}", "-Wl,-soname,libnccl.so.2"]
    state = blake2b(repr(flags).encode(), digest_size=8)
    for source in SOURCES:
        state.update(source.read_bytes())
    folder = ROOT / "build/fake_nccl" / state.hexdigest()
    library = folder / "libnccl.so.2"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Workers may build at the same time; whoever is last replaces a whole file by a whole file.
        own = folder / f"{os.getpid()}.so"
        units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        done = subprocess.run([compiler(), *flags, "-o", str(own), *units], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        own.replace(library)
    return library
