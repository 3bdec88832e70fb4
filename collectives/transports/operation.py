"""One operation of a process group while it is under way, and afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from gck.collectives.transports.exchange import Exchange
from gck.errors import CollectiveMismatchError

if TYPE_CHECKING:
    from gck.collectives.transports.process_group import ProcessGroupTransport

__all__ = ["Operation", "end_all"]

# gloo takes a message that is shorter than what is waited for, without a word. Where these bytes are still at
# the end of a row, nothing has come there. They differ between processes: no peer can happen to send them.
_UNTOUCHED = int.from_bytes(os.urandom(8), "little", signed=True)
# Operations on CPU tensors that are under way, on any group, and those that have ended since the last start.
# gloo's threads let go of an operation's tensors some time after `wait` returned; who lets go last needs the
# interpreter's lock, and in a process that is about to end, a thread that waits for the lock aborts it.
_held: list[Operation] = []
_holding = threading.Lock()


@dataclass(eq=False)
class Operation:
    """One operation; `result` makes what it returns from its tensors."""

    transport: ProcessGroupTransport
    name: str
    tensors: tuple[Tensor, ...]
    result: Callable[[], Tensor]
    last_words: list[Tensor] = field(default_factory=list)  # of each part, those of each row that is received
    work: Any = None  # keeps the group's sockets open
    ended: bool = False
    began: float = field(default_factory=time.monotonic)

    def receiving(self, rows: Tensor, ends: list[int]) -> Operation:
        """(W, n) bytes that come in parts that end there, and must be whole; on devices nobody looks."""
        if self.transport._gloo and rows.device.type == "cpu" and rows.shape[1] % 8 == 0:
            words = rows.view(torch.int64)
            self.last_words = [words[:, end // 8 - 1].fill_(_UNTOUCHED) for end in ends]
        return self

    def post(self, send: Callable[[], None]) -> None:
        """Calls what may fail as the operation does."""
        try:
            send()
        except BaseException as error:
            self._failed(error)

    def start(self, begin: Callable[[], Any]) -> Operation:
        with _holding:
            _held[:] = [operation for operation in _held if not operation.ended]
            if self.tensors[0].device.type == "cpu":
                _held.append(self)
        try:
            self.work = begin()
        except BaseException as error:
            self._failed(error)
        return self

    def wait(self) -> Tensor:
        """Its result; failures become typed errors. Bounded by the transport's timeout, from now on."""
        work = self.work
        try:
            if self.ended:  # another thread gave the group up: nothing has come
                self.transport._check_usable()
            if work is not None:
                self.transport._poll(work, time.monotonic(), self.tensors[0].device)
            self._check_whole()
        except BaseException as error:
            self._failed(error)
        self.end()
        return self.result()

    def _check_whole(self) -> None:
        for words in [part.tolist() for part in self.last_words]:
            if _UNTOUCHED in words:
                raise self._too_short(words.index(_UNTOUCHED))

    def check_part(self, row: int, part: int) -> None:
        """Raises unless this part of a row is whole; for those who pass it on."""
        if self.last_words and int(self.last_words[part][row]) == _UNTOUCHED:
            raise self._too_short(row)

    def _too_short(self, peer: int) -> CollectiveMismatchError:
        return CollectiveMismatchError(
            f"{self.name} on {self.transport._place()}: rank {peer} sent less than was waited for: it calls "
            "something else, or the same on another size. The group cannot be used any more"
        )

    def await_peers(self) -> None:
        """See `gck.collectives.transports.await_peers`; of gloo's own operations it is not known."""
        work = self.work  # another thread may give the group up
        if isinstance(work, Exchange):
            work.await_peers()

    def end(self) -> None:
        self.ended, self.work = True, None

    def _failed(self, error: BaseException) -> NoReturn:
        self.end()
        # Since it was started: it may have timed out before anybody waited.
        self.transport._spoil(self.name, error, time.monotonic() - self.began)


def end_all(state: object) -> None:
    """Of operations under way on the group that has this state: nobody will wait for them."""
    for operation in list(_held):
        if operation.transport._state is state:
            operation.end()
