"""The handle of a collective in flight. Source: torch.distributed's Work."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from gck.collectives.work.call import Call, Caller, stream_of
from gck.errors import CollectiveError, GroupUnusableError, WaitTimeoutError

if TYPE_CHECKING:
    from gck.collectives.transports import Transport

__all__ = ["Work"]

T = TypeVar("T")


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
        self._call: Any = Call(function, run, transport, Caller(function, device, made))
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
        return nullcontext() if self._device.type != "cuda" else torch.cuda.stream(stream_of(self._device))

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
