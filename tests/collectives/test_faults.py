"""A peer dies, or stalls: every survivor gets a typed error in time, and nothing has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gck.collectives.transports.failures import typed_error
from gck.errors import CollectiveError, CollectiveTimeoutError, PeerLostError
from tests.collectives.launcher import run_ranks

TIMEOUT = 2.0
LOST = {"PeerLostError"}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("kill", LOST),
        ("kill 0", LOST),  # the all-to-all in rounds
        # The first survivor whose wait ends closes its connections, which the other may see first.
        ("stop", {"CollectiveTimeoutError", "PeerLostError"}),
        ("stop 0", {"CollectiveTimeoutError", "PeerLostError"}),
        ("midway", LOST),
        ("pieces", LOST),
    ],
)
def test_survivors_raise_in_time(mode: str, expected: set[str], tmp_path: Path) -> None:
    reports = run_ranks("tests.collectives.fault_worker", 3, tmp_path, *mode.split(), lost=(2,))
    for report in reports[:2]:
        for algorithm, result in report.items():
            assert result["error"] in expected, (algorithm, result)
            assert result["seconds"] < TIMEOUT + 2, (algorithm, result)
            assert result["unchanged"], (algorithm, result)
            assert "the group cannot be used any more" in result["after"]
            assert result["text"].partition(":")[0] in result["after"]  # says why
            assert result["seconds_after"] < 1
    if mode.startswith("stop"):
        for algorithm in reports[0]:
            errors = [report[algorithm]["error"] for report in reports[:2]]
            assert "CollectiveTimeoutError" in errors


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by",
            PeerLostError,
        ),
        ("recv failed: Connection reset by peer", PeerLostError),
        ("writev [::1]:2: Broken pipe", PeerLostError),
        ("connect [127.0.0.1]:3: Connection refused", PeerLostError),
        ("Operation timed out!", CollectiveTimeoutError),
        ("Timed out waiting 3000ms for recv operation to complete", CollectiveTimeoutError),
        ("Application timeout caused pair closure", CollectiveTimeoutError),
        ("out of memory", CollectiveError),
    ],
)
def test_texts_of_torch_become_types(text: str, error: type[Exception]) -> None:
    typed = typed_error("all_gather", RuntimeError(text), 1.0)
    assert type(typed) is error
    assert "typically" not in str(typed)


def test_interrupts_are_not_failures_of_the_group() -> None:
    assert typed_error("all_gather", KeyboardInterrupt(), 1.0) is None
