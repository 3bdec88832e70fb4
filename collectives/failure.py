"""What the failure of one rank is to the others."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from gck.errors import CollectiveMismatchError, CorruptPayloadError, GckError

__all__ = ["give_up", "on_all_ranks"]


class Group(Protocol):
    @property
    def world_size(self) -> int: ...

    def abort(self, reason: str) -> None: ...


def on_all_ranks(error: BaseException) -> bool:
    """Whether every rank has it, so that all of them are in step and the group stays in use."""
    corrupt = isinstance(error, CorruptPayloadError) and error.on_all_ranks
    return corrupt or isinstance(error, CollectiveMismatchError)


def give_up(group: Group, function: str, error: BaseException, *, even_alone: bool = False) -> None:
    """Gives the group up after an error that this rank may have alone; unless there are no others, but
    `even_alone` where calls that wait for their turn count on this one.

    They wait for what will not come, and would take for it what this rank sends next, if it has the same
    size. To have sent nothing yet does not help: what ranks count of their calls differs from then on.
    """
    alone = group.world_size == 1 and isinstance(error, Exception) and not even_alone
    if alone or on_all_ranks(error):
        return
    known = isinstance(error, GckError)
    reason = f"{function} failed: {error}" if known else f"{type(error).__name__} in {function}"
    with suppress(Exception):  # the error is what counts
        group.abort(reason)
