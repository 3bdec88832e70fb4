"""Lost peers in DDP: `loss.backward()` raises, in time and with nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collectives.launcher import run_ranks

TIMEOUT = 2.0


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_the_training_loop_sees_it(signal: str, tmp_path: Path) -> None:
    for report in run_ranks("tests.collectives.ddp_fault_worker", 3, tmp_path, signal, lost=(2,))[:2]:
        assert report["error"] in {"PeerLostError", "CollectiveTimeoutError"}, report
        assert report["seconds"] < TIMEOUT + 2, report
        assert report["unchanged"], report
