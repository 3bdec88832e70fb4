"""Turns the signals that end a program into exceptions, so that `finally` clauses run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Terminated", "postponed", "raising", "shielded"]

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(SystemExit):
    """The process was asked to end; exits with 128 + the signal's number unless somebody catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    # A handler that does nothing, not SIG_IGN: children would inherit the latter.
    pass


@contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            # None: a handler that was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def raising() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Terminated`, as SIGINT raises KeyboardInterrupt."""
    with _handling(ENDING, _raise):
        yield


@contextmanager
def shielded() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP are dropped: for clean-up that must not stop half way."""
    with _handling((signal.SIGINT, *ENDING), _ignore):
        yield


@contextmanager
def postponed() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP wait; what they raise is raised at its end. For a step that must
    not stop before somebody knows of what it made."""
    arrived: list[int] = []
    try:
        with _handling((signal.SIGINT, *ENDING), lambda number, _: arrived.append(number)):
            yield
    finally:
        if arrived:
            signal.raise_signal(arrived[0])
