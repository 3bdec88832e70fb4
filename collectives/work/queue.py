"""The queue: one collective of a group at a time, in the order of the calls; and its end."""

from __future__ import annotations

import atexit
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from gck.collectives.work.handle import Work
from gck.errors import CollectiveError, CollectiveTimeoutError, GroupUnusableError

__all__ = ["TurnLimit", "WorkQueue", "join_at_exit"]

LEAVE = 2.0  # seconds that the end of the interpreter waits for what is in flight


class TurnLimit(NamedTuple):
    """What a wait for the turn is bounded by.

    Attributes:
        timeout: seconds, anew whenever a call before it has ended.
        check: called with the function's name while waiting; raises where the group cannot be used any more.
        abort: called with a reason where the time is over.
    """

    timeout: float
    check: Callable[[str], object]
    abort: Callable[[str], object]


class WorkQueue:
    """Whose turn it is among the collectives of one rank and group. For every thread."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may end a queue from anywhere.
        self._condition = threading.Condition(threading.RLock())
        self._line: deque[object] = deque()  # works, and an object for each synchronous call
        self._owner: int | None = None  # the thread that has the turn
        self._ended = 0  # calls that have had it
        self._worker: threading.Thread | None = None
        self._ending = False
        self._closed = False

    @contextmanager
    def turn(self, function: str, limit: TurnLimit | None = None) -> Iterator[None]:
        """Within it nothing else of the group runs. What it calls is in the same turn.

        Raises:
            CollectiveError: on the worker thread, outside of what it runs: in a callback.
            CollectiveTimeoutError: the turn did not come within the limit, and the group was aborted.
            What the limit's check raises.
        """
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        self.refuse_callback(function)
        place = object()
        try:
            with self._condition:
                self._line.append(place)
                came = self._await_turn(place, function, limit)
                if came:
                    self._owner = me
            if limit is not None and not came:
                text = f"{function}: another call had the group for {limit.timeout:g} s"
                limit.abort(text)
                raise CollectiveTimeoutError(text)
            yield
        finally:
            with self._condition:
                if self._owner == me:
                    self._owner = None
                with suppress(ValueError):  # interrupted before it was in
                    self._line.remove(place)
                self._ended += 1
                self._condition.notify_all()

    def _await_turn(self, place: object, function: str, limit: TurnLimit | None) -> bool:
        """Returns when `place` is the first in the line, or the limit is over: whether it is the first."""
        began, ended = time.monotonic(), self._ended
        while self._line[0] is not place:
            left = None
            if limit is not None:
                limit.check(function)
                if self._ended != ended:
                    began, ended = time.monotonic(), self._ended
                left = began + limit.timeout - time.monotonic()
                if left <= 0:
                    return False
            self._condition.wait(left)
        return True

    def submit(self, work: Work[Any]) -> None:
        """Puts a work at the end of the line.

        Raises:
            CollectiveError: called on the worker thread.
            GroupUnusableError: the interpreter is ending.
        """
        self.refuse_callback(work._function)
        with self._condition:
            if self._closed:
                raise GroupUnusableError(f"{work._function}: the interpreter is ending")
            self._line.append(work)
            self._ending = False
            if self._worker is None:
                _running.add(self)
                self._worker = threading.Thread(target=self._serve, name="gck collectives", daemon=True)
                self._worker.start()
            self._condition.notify_all()

    def refuse_callback(self, what: str) -> None:
        """Raises CollectiveError on the worker thread, which would wait for itself."""
        if threading.current_thread() is self._worker:
            raise CollectiveError(
                f"{what}: called from a callback of asynchronous work on the same group, where ranks would "
                "disagree on the order; call it where the work is waited for"
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until no work is in the line; whether that came in time."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._works(), timeout)

    def end(self) -> None:
        """The worker thread ends with what is in the line; the next work starts another."""
        with self._condition:
            self._ending = True
            self._condition.notify_all()

    def close(self, deadline: float) -> int:
        """Ends with the interpreter; how many works it had to give up after `deadline` (time.monotonic)."""
        with self._condition:
            self._closed, worker = True, self._worker
        if worker is None or worker is threading.current_thread():
            return 0
        in_time = self.drain(max(0.0, deadline - time.monotonic()))
        with self._condition:
            works = self._works()
        if not in_time and works:
            with suppress(Exception):
                works[0]._give_up("the interpreter is ending")
        self.end()
        # A thread that came back from C++ into an interpreter that is gone would take the process down.
        worker.join(LEAVE)
        return len(works)

    def _works(self) -> list[Work[Any]]:
        return [entry for entry in self._line if isinstance(entry, Work)]

    def _serve(self) -> None:
        work: Work[Any] | None
        while (work := self._next()) is not None:
            # Of the call, not of the work: the traceback of an error holds the frames that raised it, and a
            # handle that was dropped must be free to go, and to warn.
            result, error = work._call.outcome()
            work._end(error)
            with self._condition:
                self._owner = None
                self._ended += 1
                self._line.popleft()
                self._condition.notify_all()
            try:
                work._complete(result)
            except Exception as unexpected:  # of torch's future
                sys.stderr.write(f"gck: {work!r}: {unexpected!r}\n")
            work = result = error = None  # this may be all that knows of them

    def _next(self) -> Work[Any] | None:
        """The next work, with the turn; None where the thread is to end."""
        with self._condition:
            while True:
                if self._line and isinstance(self._line[0], Work):
                    self._owner = threading.get_ident()
                    return self._line[0]
                if self._ending and not self._works():
                    self._worker = None
                    return None
                self._condition.wait()


_running: weakref.WeakSet[WorkQueue] = weakref.WeakSet()
_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_starting = threading.Lock()


def join_at_exit(thread: threading.Thread) -> None:
    """The end of the interpreter waits for this thread, too, which a work may start; for at most `LEAVE`."""
    with _starting:
        _started.add(thread)


def _leave() -> None:
    """At the end of the interpreter: what is in flight gets a little time, then its group is given up."""
    deadline = time.monotonic() + LEAVE
    given_up = sum([queue.close(deadline) for queue in list(_running)])
    if given_up:
        sys.stderr.write(
            f"gck: {given_up} asynchronous collectives were in flight at the end, and given up\n"
        )
    deadline = time.monotonic() + LEAVE
    with _starting:
        alive = [thread for thread in _started if thread.is_alive()]
    for thread in alive:
        thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_leave)
