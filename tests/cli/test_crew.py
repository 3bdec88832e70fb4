"""Workers that are started while the user loses patience."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gck.cli.crew import crew
from gck.cli.signals import Terminated, postponed, raising

SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_interrupted_as_a_worker_starts(
    number: int, raised: type[BaseException], rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the process is there, and before anybody could note it down."""
    made: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def popen_and_interrupt(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        made.append(popen(*args, **options))
        if len(made) == rank + 1:
            os.kill(os.getpid(), number)
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen_and_interrupt)
    with raising(), pytest.raises(raised), crew([SLEEPS] * 2, {}, tmp_path):
        pytest.fail("the signal was lost")
    assert len(made) == rank + 1
    assert all(process.returncode == -signal.SIGKILL for process in made)


def test_a_postponed_signal_goes_along_with_an_error() -> None:
    def fail() -> None:
        with postponed():
            os.kill(os.getpid(), signal.SIGINT)
            raise OSError("no such program")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert isinstance(caught.value.__context__, OSError)


def test_nothing_is_raised_for_nothing() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with postponed():
        pass
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
