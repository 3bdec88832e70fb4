"""The all-gather in a ring: what is sent when, and that it stops when nobody wants it any more."""

from __future__ import annotations

import gc
import threading
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch

from gck.collectives.transports import ring
from gck.errors import CollectiveMismatchError, GroupUnusableError

WORLD_SIZE, RANK, NBYTES = 4, 1, ring.HALVE_FROM


class Work:
    """A send or receive, which ends when it is let."""

    def __init__(self, kind: str, peer: int, tag: int, first: int) -> None:
        self.name, self.first, self.ends = (kind, peer, tag), first, threading.Event()

    def wait(self, timeout: Any) -> None:
        assert self.ends.wait(20)


class Network:
    """Everything that is posted, in order."""

    def __init__(self) -> None:
        self.posted: list[Work] = []
        self.changed = threading.Condition()

    def post(self, kind: str, tensor: Any, peer: int, tag: int) -> Work:
        with self.changed:
            self.posted.append(Work(kind, peer, tag - ring.TAG, int(tensor[0])))
            self.changed.notify_all()
            return self.posted[-1]

    def until(self, count: int) -> list[Work]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.posted) >= count, 20)
            return list(self.posted)


class Group:
    """Stands in for a process group; one that can be forgotten."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def recv(self, tensors: list[Any], source: int, tag: int) -> Work:
        return self.network.post("recv", *tensors, source, tag)

    def send(self, tensors: list[Any], to: int, tag: int) -> Work:
        return self.network.post("send", *tensors, to, tag)


class Broken(Group):
    def send(self, tensors: list[Any], to: int, tag: int) -> Work:
        raise RuntimeError("Connection closed by peer")


@pytest.fixture
def network() -> Network:
    return Network()


SEND = torch.full((NBYTES,), 9, dtype=torch.uint8)


def make(group: Any, check: Any = lambda source, part: None) -> tuple[ring.Ring, Any]:
    rows = torch.zeros(WORLD_SIZE, NBYTES, dtype=torch.uint8)
    return ring.Ring(group, rows, RANK, 20.0, check), rows


def start(group: Any, after: ring.Ring | None = None, check: Any = None) -> tuple[ring.Ring, Any]:
    made, rows = make(group, check or (lambda source, part: None))
    made.send(SEND, after)
    return made, rows


def test_parts_are_passed_on_as_they_come(network: Network) -> None:
    checked: list[tuple[int, int]] = []
    made, rows = start(Group(network), check=lambda source, part: checked.append((source, part)))
    posted = network.until(8)
    # All that will come from the rank before it, and its own message to the one after it.
    assert [work.name for work in posted] == [("recv", 0, tag) for tag in range(6)] + [
        ("send", 2, 0),
        ("send", 2, 1),
    ]
    assert [work.first for work in posted[6:]] == [9, 9]
    for number, source in enumerate((0, 0, 3, 3)):
        assert len(network.until(8 + number)) == 8 + number
        half = slice(NBYTES // 2) if number % 2 == 0 else slice(NBYTES // 2, None)
        rows[source, half] = 10 + number
        posted[number].ends.set()
        passed_on = network.until(9 + number)[-1]
        assert passed_on.name == ("send", 2, 2 + number)
        assert passed_on.first == 10 + number
    for work in network.posted:
        assert not made.is_completed()
        work.ends.set()
    made.wait()
    assert len(network.posted) == 12  # what the last one sends is this rank's neighbour's own
    assert rows[RANK].eq(9).all()
    assert checked == [(source, part) for source in (0, 3, 2) for part in (0, 1)]


def test_a_ring_sends_when_the_one_before_it_has_sent_everything(network: Network) -> None:
    first, _ = start(Group(network))
    second, _ = start(Group(network), first)
    posted = network.until(14)
    assert [work.name[0] for work in posted] == ["recv"] * 6 + ["send"] * 2 + ["recv"] * 6
    for number in range(4):
        assert not first.is_near()
        assert len(network.posted) == 14 + number
        posted[number].ends.set()
        network.until(15 + number)
    # The last message of the first ring has not come yet.
    assert [work.name for work in network.until(20)[18:]] == [("send", 2, 0), ("send", 2, 1)]
    done = 0
    while not (first.is_completed() and second.is_completed()):
        for work in network.posted[done:]:
            work.ends.set()
            done += 1
    first.wait()
    second.wait()
    assert len(network.posted) == 24


def test_what_will_come_is_asked_for_once(network: Network) -> None:
    """By several rings, before any of them has something to send."""
    rings: list[ring.Ring] = []
    for _ in range(2):
        made, _ = make(Group(network))
        made.expect()
        rings.append(made)
    asked = [("recv", 0, tag) for tag in range(6)]
    assert [work.name for work in network.posted] == asked * 2
    for made, after in zip(rings, [None, *rings], strict=False):
        made.send(SEND, after)
    assert [work.name for work in network.until(14)[12:]] == [("send", 2, 0), ("send", 2, 1)]
    done = 0
    while not all(made.is_completed() for made in rings):
        for work in network.posted[done:]:
            work.ends.set()
            done += 1
    for made in rings:
        made.wait()
    assert len(network.posted) == 24


def test_it_stops(network: Network) -> None:
    group = Group(network)
    alive = weakref.ref(group)
    made, _ = start(group)
    del group
    network.until(8)
    made.stop()
    network.posted[0].ends.set()
    made.await_peers()
    with pytest.raises(GroupUnusableError, match="given up"):
        made.wait()
    assert made.is_completed()
    assert len(network.posted) == 8  # nothing was passed on
    for thread in threading.enumerate():
        if thread.name == "gck ring":
            thread.join(20)
    gc.collect()
    assert alive() is None  # connections are closed: nothing comes that somebody must take


def test_what_is_refused_is_not_passed_on(network: Network) -> None:
    def check(source: int, part: int) -> None:
        raise CollectiveMismatchError(f"{source} {part}")

    made, _ = start(Group(network), check=check)
    network.until(8)[0].ends.set()
    with pytest.raises(CollectiveMismatchError, match="0 0"):
        made.wait()
    assert len(network.posted) == 8
    for work in network.posted:
        work.ends.set()


def test_part_ends() -> None:
    for nbytes in (0, 1, 16, 100, ring.HALVE_FROM - 1, ring.HALVE_FROM, ring.HALVE_FROM + 9, 1 << 20):
        ends = ring.part_ends(nbytes)
        assert ends[-1] == nbytes
        assert len(ends) == (1 if nbytes < ring.HALVE_FROM else 2)
        assert all(end % 16 == 0 for end in ends[:-1])


def test_a_wait_that_is_too_short(network: Network) -> None:
    """Whoever waits looks whether the group was given up, and waits on."""
    made, _ = start(Group(network))
    with pytest.raises(RuntimeError, match="timed out"):
        made.wait(timedelta(seconds=0.01))
    made.stop()
    for work in network.until(8):
        work.ends.set()
    with pytest.raises(GroupUnusableError):
        made.wait(timedelta(seconds=20))


def test_a_start_that_fails(network: Network) -> None:
    group = Broken(network)
    alive = weakref.ref(group)
    made, _ = make(group)
    del group
    with pytest.raises(RuntimeError, match="closed by peer"):
        made.send(SEND, None)
    network.posted.clear()
    gc.collect()
    assert alive() is None
    after, _ = start(Group(network), made)  # which waits for it, and learns of it
    for failed in (made, after):
        failed.await_peers()
        with pytest.raises(RuntimeError, match="closed by peer"):
            failed.wait()
    for work in network.posted:
        work.ends.set()
