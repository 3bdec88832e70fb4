"""The all-to-all in rounds: that it stops between them when nobody wants it any more."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from gck.collectives.transports import rotation
from gck.errors import GroupUnusableError

WORLD_SIZE = 4


class Round:
    """A message that arrives when it is let."""

    def __init__(self, begun: threading.Semaphore, arrives: threading.Semaphore) -> None:
        self.begun, self.arrives = begun, arrives

    def wait(self, timeout: Any) -> None:
        self.begun.release()
        assert self.arrives.acquire(timeout=20)


class Network:
    """Stands in for torch.distributed: each round waits until the test lets it go on."""

    def __init__(self) -> None:
        self.rounds: list[Any] = []
        self.sent: list[int] = []
        self.begun, self.arrives = threading.Semaphore(0), threading.Semaphore(0)

    def irecv(self, tensor: Any, group: Any, tag: int, group_src: int) -> Round:
        self.rounds.append(group)
        return Round(self.begun, self.arrives)

    def isend(self, tensor: Any, group: Any, tag: int, group_dst: int) -> None:
        self.sent.append(group_dst)


class Group:
    """Something that can be forgotten."""


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    monkeypatch.setattr(rotation, "dist", made)
    return made


def start(group: Any, after: rotation.Rotation | None = None, as_made: bool = False) -> rotation.Rotation:
    rows = torch.zeros(WORLD_SIZE, 8, dtype=torch.uint8)
    made = rotation.Rotation(group, rows, rows.clone(), 1, 20.0, after, as_made)
    made.start()
    return made


def test_it_stops_between_rounds(network: Network) -> None:
    first = start(Group())
    second = start(Group(), first)
    assert network.begun.acquire(timeout=20)
    second.stop()  # of the one before it, too
    network.arrives.release()
    for stopped in (second, first):
        with pytest.raises(GroupUnusableError, match="given up"):
            stopped.wait()
        assert stopped.is_completed()
    assert len(network.rounds) == 1


def test_it_keeps_its_group_until_its_end(network: Network) -> None:
    group = Group()
    alive = weakref.ref(group)
    started = start(group)
    del group
    for _ in range(WORLD_SIZE - 1):
        assert network.begun.acquire(timeout=20)
        gc.collect()
        assert alive() is not None
        network.arrives.release()
    started.wait()
    network.rounds.clear()
    gc.collect()
    assert alive() is None


def test_rows_that_are_never_made_keep_nobody_waiting(network: Network) -> None:
    started = start(Group(), as_made=True)
    started.made(2)
    assert network.begun.acquire(timeout=20)  # the first round
    network.arrives.release()
    started.coming(0)
    started.stop()
    with pytest.raises(GroupUnusableError, match="given up"):
        started.wait()
    started.coming(2)  # whoever makes rows hears of the end when he waits for it
    assert network.sent == [2]


def test_rows_are_sent_as_they_are_made(network: Network) -> None:
    started = start(Group(), as_made=True)
    for _ in range(WORLD_SIZE - 1):
        network.arrives.release()
    order = list(rotation.order_of_rows(1, WORLD_SIZE))
    assert order == [2, 3, 0, 1]
    for j, row in enumerate(order):
        started.coming(j - 1)
        assert network.sent == order[:j]
        started.made(row)
    started.wait()
    assert network.sent == order[:-1]
