"""Cables that are pulled out of real links: for two seconds, and for good."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gck.cli.links import Node, links, unavailable_reason
from tests.collectives.launcher import run_ranks

REASON = unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
OUTAGE = 2.0


def run(nodes: list[Node], directory: Path, timeout: float, steps: int, replug: bool) -> list[Any]:
    """Ranks whose last one loses its link a moment after all of them have begun."""

    def pull() -> None:
        while not all((directory / f"{rank}.begun").exists() for rank in range(3)):
            time.sleep(0.01)
        time.sleep(0.3)
        nodes[2].plug(False)
        if replug:
            time.sleep(OUTAGE)
            nodes[2].plug(True)

    puller = threading.Thread(target=pull)
    puller.start()
    try:
        spaces = [node.namespace for node in nodes]
        arguments = (str(timeout), str(steps))
        return run_ranks("tests.collectives.outage_worker", 3, directory, *arguments, namespaces=spaces)
    finally:
        puller.join()


def test_an_outage_of_two_seconds_is_survived(tmp_path: Path) -> None:
    with links(3, "100mbit") as nodes:
        reports = run(nodes, tmp_path, timeout=30, steps=60, replug=True)
    for report in reports:
        assert report["error"] == "none", report
        assert len(report["bits"]) == 60
        assert max(report["seconds"]) > OUTAGE - 0.5  # it was there
    assert reports[0]["bits"] == reports[1]["bits"] == reports[2]["bits"]


def test_a_black_hole_is_a_timeout(tmp_path: Path) -> None:
    timeout = 2.0
    with links(3, "100mbit") as nodes:
        reports = run(nodes, tmp_path, timeout=timeout, steps=10_000, replug=False)
    for report in reports:
        assert report["error"] in {"CollectiveTimeoutError", "PeerLostError"}, report
        assert report["seconds"][-1] < timeout + 2
        assert report["unchanged"]
    assert "CollectiveTimeoutError" in {report["error"] for report in reports}
    done = [len(report["bits"]) for report in reports]
    # Nobody is more than one step ahead, and what all have done is the same.
    assert max(done) - min(done) <= 1
    shared = [report["bits"][: min(done)] for report in reports]
    assert shared[0] == shared[1] == shared[2]
