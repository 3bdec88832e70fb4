"""The states of many tensors, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gck.error_feedback.checks import STATE_VERSION, check_factor, check_place, check_version
from gck.error_feedback.scaling import check_scaled, check_writable
from gck.error_feedback.state import ErrorFeedback
from gck.errors import DtypeError, StateMismatchError
from gck.statistics import Statistics
from gck.values import check_flags, plain_int, shown

__all__ = ["ErrorFeedbackMap"]


class ErrorFeedbackMap:
    """One `ErrorFeedback` a name, made on first use: ``residuals["layer.weight"]``.

    Attributes:
        measure: of those that will be made; setting it sets those that there are, too. See `ErrorFeedback`.
    """

    def __init__(self, *, measure: bool = False) -> None:
        self._states: dict[str, ErrorFeedback] = {}
        self.measure = measure

    @property
    def measure(self) -> bool:
        return self._measure

    @measure.setter
    def measure(self, value: bool) -> None:
        check_flags("ErrorFeedbackMap", measure=value)
        self._measure = value
        for state in self._states.values():
            state.measure = value

    def __getitem__(self, name: str) -> ErrorFeedback:
        if not isinstance(name, str):
            raise DtypeError(f"ErrorFeedbackMap: a name must be a str, got {shown(name)}")
        return self._states.setdefault(name, ErrorFeedback(measure=self.measure))

    def __contains__(self, name: object) -> bool:
        return name in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def items(self) -> Iterator[tuple[str, ErrorFeedback]]:
        return iter(self._states.items())

    def statistics(self) -> dict[str, Statistics]:
        """Those that were taken (see `ErrorFeedback.measure`), by name."""
        taken = {name: state.statistics for name, state in self._states.items()}
        return {name: each for name, each in taken.items() if each is not None}

    def rename(self, old: str, new: str) -> None:
        """Moves a state to another name."""
        self._states[new] = self._states.pop(old)

    def reset(self) -> None:
        """Forgets every residual."""
        self._states.clear()

    def rescale_(self, factor: float, *, drop: bool = False) -> None:
        """`ErrorFeedback.rescale_` of all; where one of them raises, none was changed."""
        function = "ErrorFeedbackMap.rescale_"
        factor = check_factor(function, factor)
        check_flags(function, drop=drop)
        for name, state in self._states.items():
            residuals = {f"worker residual of {name!r}": state.worker}
            residuals[f"server residual of {name!r}"] = state.server
            check_writable(function, residuals)
            if not drop:
                check_scaled(function, residuals, factor)
        for state in self._states.values():
            state.multiply_(factor, drop=drop)

    def state_dict(self) -> dict[str, Any]:
        """A plain dict: the states by name, and a version."""
        return {
            "version": STATE_VERSION,
            "tensors": {name: state.state_dict() for name, state in self._states.items()},
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        numels: Mapping[str, int] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        reset_server: bool = False,
    ) -> None:
        """Replaces all states by new ones with what was saved; see `ErrorFeedback.load_state_dict`.

        Args:
            numels: elements of each gradient; with it, a saved name that it lacks is an error as well. It may
                have more names than were saved.

        Raises:
            StateMismatchError: one of the states does not fit; nothing was changed.
        """
        function = "ErrorFeedbackMap.load_state_dict"
        check_flags(function, reset_server=reset_server)
        check_place(function, plain_int(rank), plain_int(world_size))
        if numels is not None and not isinstance(numels, Mapping):
            raise DtypeError(f"{function}: numels must be a dict, got {shown(numels)}")
        check_version(function, state)
        tensors = state.get("tensors")
        if not isinstance(tensors, Mapping):
            raise StateMismatchError(f"load_state_dict: tensors must be a dict, got {shown(tensors)}")
        fresh: dict[str, ErrorFeedback] = {}
        for name, saved in tensors.items():
            if numels is not None and name not in numels:
                raise StateMismatchError(f"load_state_dict: no parameter is named {name!r}")
            numel = None if numels is None else numels[name]
            present = self._states.get(name)
            if numel is None and present is not None:
                numel = present.numel
            fresh[name] = ErrorFeedback(measure=(self if present is None else present).measure)
            try:
                fresh[name].load_state_dict(
                    saved, numel=numel, rank=rank, world_size=world_size, reset_server=reset_server
                )
            except StateMismatchError as error:
                raise StateMismatchError(f"{name}: {error}") from error
        self._states = fresh
