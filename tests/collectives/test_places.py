"""A peer dies, or stalls, before, during and after each phase: the right result or a typed error, in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gck.collectives import SimulatedGroup, SimulatedMember, all_reduce_
from gck.error_feedback import ErrorFeedback
from gck.kernels.sign import Sign
from tests.collectives.launcher import run_ranks

TIMEOUT = 2.0
NUMEL = 100_000
PLACES = (
    "before the all-to-all",
    "during the all-to-all",
    "between the phases",
    "during the all-gather",
    "after the all-gather",
)


def right_bits() -> int:
    def rank_main(member: SimulatedMember) -> int:
        grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(member.rank))
        all_reduce_(grad, ErrorFeedback(), Sign(64), member, algorithm="two_phase")
        return int(grad.view(torch.int32).long().sum())

    return SimulatedGroup(3, timeout=30).run(rank_main)[0]


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
@pytest.mark.parametrize("place", range(len(PLACES)), ids=PLACES.__getitem__)
def test_survivors(place: int, signal: str, tmp_path: Path) -> None:
    reports = run_ranks("tests.collectives.place_worker", 3, tmp_path, signal, str(place), lost=(2,))[:2]
    for report in reports:
        assert report["seconds"] < TIMEOUT + 2, report
        if report["error"] == "none":
            assert report["bits"] == right_bits(), report
            assert not report["unchanged"]
        else:
            assert report["error"] in {"PeerLostError", "CollectiveTimeoutError"}, report
            assert report["unchanged"], report
    errors = [report["error"] for report in reports]
    if place < 3:  # nobody has everything
        assert "none" not in errors, reports
    if place == 4:
        assert errors == ["none", "none"], reports
