"""What a work does, and how the worker thread does it as the caller's would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from gck.collectives.failure import give_up
from gck.errors import ArgumentError

if TYPE_CHECKING:
    from gck.collectives.transports import Transport

__all__ = ["Call", "Caller", "stream_of"]

T = TypeVar("T")
_local = threading.local()


class Caller:
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
            own = stream_of(self.stream.device)
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


class Call(Generic[T]):
    """What a work does; dropped with all that it holds once it is done."""

    def __init__(self, function: str, run: Callable[[], T], transport: Transport, caller: Caller) -> None:
        self.function, self.run, self.transport, self.caller = function, run, transport, caller

    def outcome(self) -> tuple[Any, BaseException | None]:
        """Result and error."""
        try:
            with self.caller.here():
                return self.run(), None
        except BaseException as error:
            give_up(self.transport, self.function, error, even_alone=True)
            return None, error


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """This thread's own stream of a device."""
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
