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
    """Each round waits until the test lets it go on."""

    def __init__(self) -> None:
        self.rounds: list[Any] = []
        self.sent: list[int] = []
        self.begun, self.arrives = threading.Semaphore(0), threading.Semaphore(0)

    def recv(self, group: Any, source: int, tag: int) -> Round:
        self.rounds.append(group)
        return Round(self.begun, self.arrives)

    def send(self, to: int, tag: int) -> None:
        self.sent.append(to)


class Group:
    """Stands in for a process group; one that can be forgotten."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def recv(self, tensors: list[Any], source: int, tag: int) -> Any:
        return self.network.recv(self, source, tag)

    def send(self, tensors: list[Any], to: int, tag: int) -> Any:
        return self.network.send(to, tag)


@pytest.fixture
def network() -> Network:
    return Network()


def start(
    group: Any, after: rotation.Rotation | None = None, as_made: bool = False, nbytes: int = 8
) -> rotation.Rotation:
    rows = torch.zeros(WORLD_SIZE, nbytes, dtype=torch.uint8)
    made = rotation.Rotation(group, rows, rows.clone(), 1, 20.0, after, as_made)
    made.start()
    return made


def test_it_stops_between_rounds(network: Network) -> None:
    first = start(Group(network))
    second = start(Group(network), first)
    assert network.begun.acquire(timeout=20)
    second.stop()  # of the one before it, too
    network.arrives.release()
    for stopped in (second, first):
        with pytest.raises(GroupUnusableError, match="given up"):
            stopped.wait()
        assert stopped.is_completed()
    assert network.sent == [2]


def test_it_keeps_its_group_until_its_end(network: Network) -> None:
    group = Group(network)
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
    started = start(Group(network), as_made=True)
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
    started = start(Group(network), as_made=True)
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


def test_parts() -> None:
    for nbytes in (0, 8, rotation.DIVIDE_FROM - 1):
        assert rotation.part_ends(nbytes) == [nbytes]
        assert [tag for tag, _ in rotation.parts_of(torch.zeros(nbytes, dtype=torch.uint8))] == [rotation.TAG]
    for nbytes in (rotation.DIVIDE_FROM, rotation.DIVIDE_FROM + 7, 1 << 20):
        message = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
        tags, parts = zip(*rotation.parts_of(message), strict=True)
        assert rotation.TAG not in tags  # nor is a part taken for a message
        assert len(set(tags)) == 3
        assert all(len(part) > 0 for part in parts)
        assert torch.equal(torch.cat(parts), message)
        assert parts[0].numel() == rotation.END
        assert parts[2].numel() < rotation.END + 16


class Part:
    """A part of a message, which ends when it is let."""

    def __init__(self, name: tuple[str, int, int]) -> None:
        self.name, self.ends = name, threading.Event()

    def wait(self, timeout: Any) -> None:
        assert self.ends.wait(20)


class Parts:
    """Everything that is posted, in order."""

    def __init__(self) -> None:
        self.posted: list[Part] = []
        self.changed = threading.Condition()

    def _post(self, kind: str, peer: int, tag: int) -> Part:
        with self.changed:
            self.posted.append(Part((kind, peer, tag - rotation.TAG)))
            self.changed.notify_all()
            return self.posted[-1]

    def recv(self, group: Any, source: int, tag: int) -> Part:
        return self._post("recv", source, tag)

    def send(self, to: int, tag: int) -> Part:
        return self._post("send", to, tag)

    def until(self, count: int) -> list[tuple[str, int, int]]:
        """What was posted, once it is so much."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.posted) >= count, 20)
            return [part.name for part in self.posted]

    def end(self, *numbers: int) -> None:
        for number in numbers:
            self.posted[number].ends.set()


def test_a_round_does_not_wait_for_the_last_part_before_it() -> None:
    network = Parts()
    first = start(Group(network), nbytes=rotation.DIVIDE_FROM)
    second = start(Group(network), first, nbytes=rotation.DIVIDE_FROM)

    def round_of(to: int, source: int) -> list[tuple[str, int, int]]:
        return [(kind, peer, i) for kind, peer in (("recv", source), ("send", to)) for i in (1, 2, 3)]

    expected: list[tuple[str, int, int]] = []
    for j in range(2 * (WORLD_SIZE - 1)):
        i = j % (WORLD_SIZE - 1) + 1
        expected += round_of((1 + i) % WORLD_SIZE, (1 - i) % WORLD_SIZE)
        assert network.until(len(expected)) == expected
        if j:  # what the round before has not waited for
            network.end(6 * j - 4, 6 * j - 3, 6 * j - 2, 6 * j - 1)
        network.end(6 * j, 6 * j + 1)  # all but the last part
    first.wait()
    last = 6 * 2 * (WORLD_SIZE - 1)
    for number in range(last - 4, last):
        assert not second._done.wait(0.01)
        network.end(number)
    second.wait()
