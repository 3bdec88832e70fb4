import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import gck
import gck._native
from gck.cli import app, doctor, self_check
from gck.cli.doctor import Finding
from gck.compressor import REGISTRY, compressor_class
from gck.errors import BackendUnavailableError

ROWS = ("gck", "PyTorch", "CPU kernels", "self-check", "OpenMP", "gloo", "Triton")


def test_json_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gck.cli", "doctor", "--json"], capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    assert (done.returncode == 0) == report["cpu_path_works"]
    found = {finding["name"]: finding for finding in report["findings"]}
    assert set(ROWS) <= set(found)
    assert {"NCCL", "CuPy", "safetensors", "xxhash", "slow links"} <= set(found)
    assert found["PyTorch"]["detail"].startswith(torch.__version__)
    for finding in found.values():
        assert set(finding) == {"name", "works", "detail", "advice", "required"}


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "gck", "--version"], capture_output=True, text=True)
    assert done.stdout == f"gck {gck.__version__}\n"
    assert done.returncode == 0


def test_table() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for row in ROWS:
        assert row in done.output
    assert "same bytes as the reference" in done.output
    assert "The CPU path works." in done.output


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise BackendUnavailableError("gck._C: the compiled module cannot be loaded")

    monkeypatch.setattr(gck._native, "load", load)
    monkeypatch.setattr(gck.kernels.topk.cpu, "load", load)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert not found["CPU kernels"]["works"]
    assert not found["self-check"]["works"]
    assert "not run: gck._C: the compiled module" in found["self-check"]["detail"]
    assert found["gloo"]["works"]


@pytest.mark.parametrize(
    ("place", "text"),
    [("values", "the payload differs"), ("err", "the residual differs"), ("out", "what is decoded differs")],
)
def test_wrong_bytes_are_found(place: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBitOff(gck.TopK):
        def compress_(self, grad: Tensor, err: Tensor | None, bodies: Tensor, **options: Any) -> None:
            super().compress_(grad, err, bodies, **options)
            if place == "values":
                bodies[0, 0] ^= 1
            elif place == "err" and err is not None:
                err.view(torch.int32)[-1] ^= 1

        def decompress_(self, out: Tensor, body: Tensor, **options: Any) -> None:
            super().decompress_(out, body, **options)
            if place == "out":
                out.view(torch.int32)[0] ^= 1

    OneBitOff.__module__ = gck.TopK.__module__
    monkeypatch.setitem(self_check.COMPRESSORS, "top-k", OneBitOff(ratio=0.01))
    (found,) = doctor._self_checks()
    assert (found.works, found.detail) == (False, f"top-k: {text}")
    assert "do not train" in found.advice


def test_a_kernel_that_raises_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(gck.Sign):
        def decompress_(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no such kernel")

    Broken.__module__ = gck.Sign.__module__
    monkeypatch.setitem(self_check.COMPRESSORS, "signs", Broken())
    assert self_check.differences(torch.device("cpu")) == {"signs": "RuntimeError: no such kernel"}


def test_all_compressors_are_checked() -> None:
    assert {type(each) for each in self_check.COMPRESSORS.values()} == set(map(compressor_class, REGISTRY))


@pytest.mark.gpu
def test_kernels_of_the_device_are_checked() -> None:
    cpu, *devices = doctor._self_checks()
    assert len(devices) == torch.cuda.device_count()
    assert all(found.works for found in (cpu, *devices)), devices


@pytest.mark.parametrize(
    ("environment", "machine", "reason"),
    [
        ("portable", "x86_64", "the environment asks for it"),
        ("portable", "aarch64", "the environment asks for it"),
        ("", "x86_64", "this CPU has no AVX2"),
        ("", "riscv64", ""),
    ],
)
def test_why_kernels_are_portable(
    environment: str, machine: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCK_ISA", environment)
    monkeypatch.setattr(gck._native, "load", lambda: SimpleNamespace(isa=lambda: "portable"))
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    (found,) = doctor._compiled_module()
    assert found.works
    assert found.advice.partition(" (")[0].partition(":")[0] == reason


@pytest.mark.parametrize(
    ("version", "works"),
    [("3.5.1", False), ("2.10.0", False), ("3.6.0", True), ("3.10.0+git1a2b", True), ("4.0", True)],
)
def test_triton_must_be_new_enough(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))  # type: ignore[misc]
    (found,) = doctor._triton()
    assert found.works == works
    assert found.detail.startswith(version)
    assert works or "Triton 3.6 or newer" in found.advice


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", True, "seen")
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", [("broken", True, broken)])
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "OSError: no such thing" in done.output
