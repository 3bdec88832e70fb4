"""All-gathers over gloo whose messages are asked for before this rank has something to send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gck.collectives.all_gather import one_phase
from gck.collectives.scratch import scratch
from gck.collectives.undo import Undo
from gck.kernels.sign import Sign
from tests.collectives.launcher import run_ranks


@pytest.mark.parametrize("mode", ["asking", "forgotten"])
def test_a_rank_without_memory(mode: str, tmp_path: Path) -> None:
    """Peers hear of it at once, and so does who calls again; what it asked for is let go with the group."""
    reports = run_ranks("tests.collectives.asked_worker", 3, tmp_path, mode, timeout=50)
    assert [report["error"] for report in reports] == ["MemoryError", "PeerLostError", "PeerLostError"]
    for report in reports:
        assert report["after"] == "GroupUnusableError"
        assert max(report["seconds of error"], report["seconds of after"]) < 10  # the group's timeout is 60
        assert report.get("forgotten", True)


def test_a_rank_without_memory_between_tiers(tmp_path: Path) -> None:
    """Who waits for it in its node hears of it, and who waits across nodes, and who waits for these."""
    reports = run_ranks("tests.collectives.asked_worker", 4, tmp_path, "tiers", timeout=50)
    assert [report["error"] for report in reports] == ["MemoryError", *["PeerLostError"] * 3]
    for report in reports:
        assert report["after"] == "GroupUnusableError"
        assert max(report["seconds of error"], report["seconds of after"]) < 10  # the groups' timeout is 60


def test_batches_of_pieces_and_a_short_one(tmp_path: Path) -> None:
    """Where a batch has a message that goes by gloo's own all-gather, none of it is asked for."""
    assert run_ranks("tests.collectives.asked_worker", 3, tmp_path, "batches", timeout=50) == [True] * 3


def test_tensors_are_on_the_host_whatever_the_default(tmp_path: Path) -> None:
    assert run_ranks("tests.collectives.asked_worker", 2, tmp_path, "device", timeout=50) == [[1.5] * 3] * 2


class Anywhere(Sign):
    """Compresses on devices that have no memory."""

    def compress_(self, *args: Any, **options: Any) -> None:
        pass


class Listening:
    """A transport that could ask for what comes to the host."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.sent: list[Tensor] = []

    def abort(self, reason: str) -> None:
        pass

    def expect_all_gathers(self, sizes: list[int]) -> list[Any]:
        self.asked += sizes
        return [self.start_all_gather_bytes for _ in sizes]

    def start_all_gather_bytes(self, send: Tensor) -> Any:
        self.sent.append(send)
        raise ConnectionError("as far as this goes")


@pytest.mark.parametrize(("device", "asked"), [("cpu", [24 << 10] * 2), ("meta", [])])
def test_only_what_comes_to_the_host_is_asked_for(device: str, asked: list[int]) -> None:
    transport, grad = Listening(), torch.zeros(1 << 18, device=device)
    given: Any = transport, Anywhere(64), [grad], [None], [None]
    with scratch() as memory:
        undo = [Undo(grad, None, memory)]
        with pytest.raises(ConnectionError):
            one_phase(*given, undo, [grad], 2, 1 << 17, memory=memory)
    assert transport.asked == asked
    assert [message.device.type for message in transport.sent] == [device]
