import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import gck
import gck._native
from gck.cli import app, doctor
from gck.cli.doctor import Finding
from gck.errors import BackendUnavailableError

ROWS = ("gck", "PyTorch", "CPU kernels", "top-k self-check", "sign self-check", "OpenMP", "gloo", "Triton")


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

    def topk_ef_(*_: object, **__: object) -> None:
        load()

    monkeypatch.setattr(gck._native, "load", load)
    monkeypatch.setattr(gck, "topk_ef_", topk_ef_)
    monkeypatch.setattr(gck, "sign_ef_", topk_ef_)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert not found["CPU kernels"]["works"]
    assert not found["top-k self-check"]["works"]
    assert "not run" in found["sign self-check"]["detail"]
    assert found["gloo"]["works"]


def test_wrong_bytes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gck.topk_ef_

    def off_by_one_bit(grad: torch.Tensor, err: torch.Tensor, ratio: float) -> gck.SparseGrad:
        payload = real(grad, err, ratio)
        payload.values.view(torch.int32)[-1] ^= 1
        return payload

    monkeypatch.setattr(gck, "topk_ef_", off_by_one_bit)
    found = {finding.name: finding for finding in doctor.examine()}
    assert not found["top-k self-check"].works
    assert "do not train" in found["top-k self-check"].advice
    assert found["sign self-check"].works


@pytest.mark.parametrize(
    ("environment", "reason"), [("portable", "the environment asks for it"), ("", "this CPU has no AVX2")]
)
def test_why_kernels_are_portable(environment: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCK_ISA", environment)
    monkeypatch.setattr(gck._native, "load", lambda: SimpleNamespace(isa=lambda: "portable"))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    (found,) = doctor._compiled_module()
    assert found.works
    assert found.advice.startswith(reason)


@pytest.mark.parametrize(
    ("version", "works"),
    [("3.5.1", False), ("2.10.0", False), ("3.6.0", True), ("3.10.0+git1a2b", True), ("4.0", True)],
)
def test_triton_must_be_new_enough(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))  # type: ignore[misc]
    (found,) = doctor._triton()
    assert found.works == works
    assert found.detail.startswith(version)
    assert works or "triton>=3.6" in found.advice


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", True, "seen")
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", [("broken", True, broken)])
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "OSError: no such thing" in done.output
