"""Asynchronous collectives: the queue of one rank's end of a group, and the handles of what is in it.

The collectives of a group run one at a time, in the order in which this rank called them: ranks that call
the same cannot disagree on the order. Asynchronous ones run on a worker thread, which starts with the first
of them; a synchronous one waits for its turn and then runs on the thread that called it.

    1. A call checks its arguments on the caller's thread and joins the line.
    2. Whoever comes first has the turn until it has ended; then comes the next.
    3. The worker completes the handle of what it ran, in the same order.

After CollectiveMismatchError, or a CorruptPayloadError that every rank gets, the line goes on. After any
other error of an asynchronous call the group is aborted: its peers would take the messages of what is queued
behind it for those that are missing. What is queued fails at once with GroupUnusableError.

Source of the handle: torch.distributed's Work.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from gck.errors import (
    ArgumentError,
    CollectiveError,
    CollectiveMismatchError,
    CorruptPayloadError,
    DtypeError,
    GckError,
    GroupUnusableError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from gck.collectives.transports import Transport

__all__ = ["Work", "WorkQueue", "check_async_op", "perform", "submit"]

T = TypeVar("T")
LEAVE = 2.0  # seconds that the end of the interpreter waits for what is in flight


class Work(Generic[T]):
    """An asynchronous collective in flight, as torch.distributed's Work; `async_op=True` returns one.

    Until it has completed, its tensors and states must be left alone, and it keeps them alive. A handle may
    be dropped: the collective is carried out all the same, and a failure that nobody has seen is warned
    about with a RuntimeWarning.
    """

    def __init__(
        self,
        function: str,
        run: Callable[[], T],
        transport: Transport,
        device: torch.device,
        made: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._function = function
        self._queue = transport.calls.queue
        # Any: None once it has run.
        self._call: Any = _Call(function, run, transport, _Caller(function, device, made))
        self._device = device
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._seen = False
        # torch's futures order streams where they know the devices.
        self._future: torch.futures.Future[T] = torch.futures.Future(
            devices=[device] if device.type == "cuda" else None
        )

    def __repr__(self) -> str:
        state = "in flight"
        if self._done.is_set():
            state = "completed" if self._error is None else f"failed: {self._error!r}"
        return f"<Work {self._function}: {state}>"

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> T:
        """Blocks until it has ended; what the synchronous call returns.

        On a GPU the result is there, too, and the current stream may use it.

        Args:
            timeout: seconds to wait; None: as long as it takes, which the group's timeout bounds.

        Raises:
            WaitTimeoutError: it is still in flight. It goes on and can be waited for again.
            CollectiveError: called from a callback of the same group's work that it would have to wait for.
            What the synchronous call raises, but for its arguments; tensors and states are as they were.
        """
        from gck.collectives.transports import check_timeout  # which imports this module

        seconds = None if timeout is None else check_timeout(timeout)
        if not self._done.is_set():
            self._queue.refuse_callback(f"wait for {self._function}")
        if not self._done.wait(seconds):
            raise WaitTimeoutError(f"wait: {self._function} is still in flight after {seconds:g} s")
        self._seen = True
        return self._future.wait()

    def exception(self) -> BaseException | None:
        """What it failed with; None while it is in flight, and where it succeeded."""
        if not self._done.is_set():
            return None
        self._seen = True
        return self._error

    def get_future(self) -> torch.futures.Future[T]:
        """A future of what `wait` returns or raises.

        Its callbacks run on the worker thread, or where they are added when it has completed. They must not
        call collectives of the same group, nor wait for such: ranks would disagree on the order. On the
        worker thread that is a CollectiveError, in the future that `then` returned.
        """
        self._seen = True
        return self._future

    def _end(self, error: BaseException | None) -> None:
        """On the worker thread, in its turn: whoever comes next finds it completed."""
        self._call, self._error = None, error
        self._done.set()

    def _complete(self, result: Any) -> None:
        """On the worker thread, when the turn is over: callbacks have none."""
        error = self._error
        with self._stream_of_future():
            if error is None:
                self._future.set_result(result)
            elif isinstance(error, Exception):
                self._future.set_exception(error)  # type: ignore[arg-type]  # torch annotates it wrongly
            else:
                failed = CollectiveError(f"{self._function}: failed with {error!r}")
                self._future.set_exception(failed)  # type: ignore[arg-type]

    def _stream_of_future(self) -> AbstractContextManager[Any]:
        """The worker's own stream, which has ended what it had: a future waits for the current one."""
        return nullcontext() if self._device.type != "cuda" else torch.cuda.stream(_stream(self._device))

    def _give_up(self, reason: str) -> None:
        call = self._call
        if call is not None:
            call.transport.abort(reason)

    def __del__(self) -> None:
        error = getattr(self, "_error", None)
        # What failed because of an earlier failure is no news.
        if error is not None and not self._seen and not isinstance(error, GroupUnusableError):
            warnings.warn(
                f"{self._function}: failed, and nobody waited for it: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


class WorkQueue:
    """Whose turn it is among the collectives of one rank and group. For every thread."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may end a queue from anywhere.
        self._condition = threading.Condition(threading.RLock())
        self._line: deque[object] = deque()  # works, and an object for each synchronous call
        self._owner: int | None = None  # the thread that has the turn
        self._worker: threading.Thread | None = None
        self._ending = False
        self._closed = False

    @contextmanager
    def turn(self, function: str) -> Iterator[None]:
        """Within it nothing else of the group runs. What it calls is in the same turn.

        Raises:
            CollectiveError: on the worker thread, outside of what it runs: in a callback.
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
                while self._line[0] is not place:
                    self._condition.wait()
                self._owner = me
            yield
        finally:
            with self._condition:
                if self._owner == me:
                    self._owner = None
                with suppress(ValueError):  # interrupted before it was in
                    self._line.remove(place)
                self._condition.notify_all()

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


def submit(
    transport: Transport,
    function: str,
    run: Callable[[], T],
    device: torch.device,
    made: Callable[[], Iterable[Tensor]] = tuple,
) -> Work[T]:
    """Queues `run` on the group of `transport`.

    Args:
        transport: what `run` sends by.
        function: name of the public function, for texts.
        run: called on the worker thread, with the turn; collectives that it calls on the group are in it.
        device: of the tensors.
        made: called afterwards: tensors, apart from the result, that `run` may have allocated and outlive it.

    Raises:
        ArgumentError: the current stream is capturing a CUDA graph.
        CollectiveError: called from a callback of work on the same group.
    """
    work = Work(function, run, transport, device, made)
    transport.calls.queue.submit(work)
    return work


def perform(
    transport: Transport,
    function: str,
    run: Callable[[], T],
    device: torch.device,
    async_op: bool,
    made: Callable[[], Iterable[Tensor]] = tuple,
) -> T | Work[T]:
    """Runs `run` in its turn and returns its result, or queues it and returns the handle; see `submit`."""
    if async_op:
        return submit(transport, function, run, device, made)
    with transport.calls.queue.turn(function):
        return run()


def check_async_op(function: str, async_op: object) -> None:
    """Raises DtypeError unless `async_op` is a bool."""
    if not isinstance(async_op, bool):
        raise DtypeError(f"{function}: async_op must be a bool, got {type(async_op).__name__}")


class _Caller:
    """What a thread has of its own, for the worker to have, too; on a GPU, where its stream stood."""

    def __init__(self, function: str, device: torch.device, made: Callable[[], Iterable[Tensor]]) -> None:
        self.num_threads = torch.get_num_threads()
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.made = made
        self.current: int | None = None
        self.event: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.current = torch.cuda.current_device()
            with torch.cuda.device(device if device.type == "cuda" else self.current):
                if torch.cuda.is_current_stream_capturing():
                    raise ArgumentError(f"{function}: async_op=True cannot be captured in a CUDA graph")
                self.stream = torch.cuda.current_stream()
                self.event = torch.cuda.Event()
                self.event.record(self.stream)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within it this thread computes as the caller would. What was started on the GPU has ended after
        it, so that any stream may go on with the tensors and their memory."""
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.event is None:
                yield
                return
            own = _stream(self.stream.device)
            stack.enter_context(torch.cuda.stream(own))
            stack.enter_context(torch.cuda.device(self.current))
            own.wait_event(self.event)
            try:
                yield
            finally:
                own.synchronize()
            for tensor in self.made():
                if tensor.is_cuda:
                    # From the worker's pool, used and freed on the caller's stream.
                    tensor.record_stream(self.stream)


class _Call(Generic[T]):
    """What a work does; dropped with all that it holds once it is done."""

    def __init__(self, function: str, run: Callable[[], T], transport: Transport, caller: _Caller) -> None:
        self.function, self.run, self.transport, self.caller = function, run, transport, caller

    def outcome(self) -> tuple[Any, BaseException | None]:
        """Result and error."""
        try:
            with self.caller.here():
                return self.run(), None
        except CollectiveMismatchError as error:
            return None, error
        except BaseException as error:
            if isinstance(error, CorruptPayloadError) and error.on_all_ranks:
                return None, error
            reason = f"{self.function} failed: {error}" if isinstance(error, GckError) else repr(error)
            with suppress(Exception):
                self.transport.abort(reason)
            return None, error


_running: weakref.WeakSet[WorkQueue] = weakref.WeakSet()
_local = threading.local()


def _stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's own stream of a device."""
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _leave() -> None:
    """At the end of the interpreter: what is in flight gets a little time, then its group is given up."""
    deadline = time.monotonic() + LEAVE
    given_up = sum([queue.close(deadline) for queue in list(_running)])
    if given_up:
        sys.stderr.write(
            f"gck: {given_up} asynchronous collectives were in flight at the end, and given up\n"
        )


atexit.register(_leave)
