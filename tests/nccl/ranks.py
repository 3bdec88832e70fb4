"""Ranks of a communicator as threads of this process; what is expected of two that do not belong together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import gck

T = TypeVar("T")


def run_ranks(world_size: int, fn: Callable[[gck.NcclCommunicator], T], timeout: float = 20) -> list[T]:
    """fn(communicator) on every rank's thread, results in rank order; the first error is raised."""
    unique_id = gck.NcclCommunicator.create_unique_id()

    def rank_main(rank: int) -> T:
        with gck.NcclCommunicator(unique_id, rank, world_size, timeout=timeout) as comm:
            return fn(comm)

    return on_threads(world_size, rank_main)


def on_threads(world_size: int, rank_main: Callable[[int], T]) -> list[T]:
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def thread_main(rank: int) -> None:
        try:
            results[rank] = rank_main(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread_main, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


def assert_refused(reports: list[dict[str, tuple[str, str, float]]], timeout: float, late: float) -> None:
    """Of `stranger_worker`: each rank had an error of a type that says what happened, in time."""
    cases = {"other ids", "other sizes", "the same rank", "no id", "used before"}
    for report in reports:
        assert report.keys() == cases
        for case, (kind, text, seconds) in report.items():
            assert kind in ("CollectiveError", "PeerLostError", "CollectiveTimeoutError"), (case, kind, text)
            assert text.startswith("init "), (case, text)
            assert seconds < timeout + late, (case, text)
