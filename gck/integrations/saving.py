"""How a `HookState` is saved, and goes on: as files, or as a dict for a checkpoint of the user's own."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gck.checkpoint import Loaded, load_state, save_state
from gck.collectives import resolve
from gck.compressor_choice import Choosable, CompressorChoice
from gck.error_feedback import ErrorFeedbackMap
from gck.integrations.hook_checks import checked_saved
from gck.values import check_flags

__all__ = ["Saving"]

STATE_VERSION = 1


class Saving(ABC):
    """What saves a state; the rest of it is `gck.integrations.hook_state.HookState`."""

    step: int
    scale: float
    group: Any
    residuals: ErrorFeedbackMap
    _choice: CompressorChoice

    @property
    @abstractmethod
    def compressor(self) -> Choosable: ...

    @abstractmethod
    def _check_bound(self, function: str) -> None:
        """Raises ArgumentError where the parameters' names are not known."""

    @abstractmethod
    def _settle(self) -> None:
        """Waits for what may still write residuals."""

    @abstractmethod
    def _numels(self) -> dict[str, int]:
        """Elements of each parameter."""

    def save(self, directory: str | os.PathLike[str], *, keep: int = 2, shared: bool = True) -> Path:
        """Writes this rank's residuals, as of `step`, to `directory`; see `gck.save_state`.

        Raises:
            ArgumentError: the parameters' names are not known.
            Those of `gck.save_state`.
        """
        self._check_bound("save")
        self._settle()
        transport = resolve(self.group)
        return save_state(
            directory,
            self.residuals,
            rank=transport.rank,
            world_size=transport.world_size,
            step=self.step,
            compressor=self.compressor,
            scale=self.scale,
            keep=keep,
            shared=shared,
        )

    def load(
        self,
        directory: str | os.PathLike[str],
        *,
        step: int | None = None,
        reshard: bool = False,
        server: str = "keep",
        shared: bool = True,
    ) -> Loaded | None:
        """Goes on from what `save` wrote; arguments, result and errors are those of `gck.load_state`.

        Raises:
            ArgumentError: the parameters' names are not known.
            Those of `gck.load_state`; nothing was changed.
        """
        self._check_bound("load")
        self._settle()
        transport = resolve(self.group)
        loaded = load_state(
            directory,
            self.residuals,
            rank=transport.rank,
            world_size=transport.world_size,
            compressor=self.compressor,
            step=step,
            numels=self._numels(),
            reshard=reshard,
            server=server,
            shared=shared,
        )
        if loaded is not None:
            self.step, self.scale = loaded.step, loaded.scale
        return loaded

    def state_dict(self) -> dict[str, Any]:
        """A plain dict for this rank's checkpoint: residuals by parameter name, and the step.

        Raises:
            ArgumentError: the parameters' names are not known.
        """
        self._check_bound("state_dict")
        self._settle()
        transport = resolve(self.group)
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "scale": self.scale,
            "rank": transport.rank,
            "world_size": transport.world_size,
            "compressor": self._choice.describe(),
            "residuals": self.residuals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, reset_server: bool = False) -> None:
        """Continues from what `state_dict` returned on the same rank.

        A worker residual is what one rank's messages left out: loaded on another rank as well, it would
        be sent twice. So the rank must be the same, always. A world that grew starts the new ranks
        without a state, but with the others' `step`, by which all warm up and choose seeds; in one that
        shrank, the residuals of the ranks that are gone are lost.

        Args:
            state: the dict of this rank.
            reset_server: continue in a world of another size, or with another compressor: worker
                residuals are gradients, which any compressor can send later, server residuals belong to
                a shard and start from zero.

        Raises:
            ArgumentError: the parameters' names are not known.
            StateMismatchError: the state is malformed or does not fit the model, the rank, or, without
                reset_server, the world size or the compressor; nothing was changed.
        """
        check_flags("HookState.load_state_dict", reset_server=reset_server)
        self._check_bound("load_state_dict")
        self._settle()
        transport = resolve(self.group)
        fixed: dict[str, object] = {"rank": transport.rank}
        if not reset_server:
            fixed |= {"world_size": transport.world_size, "compressor": self._choice.describe()}
        step, scale = checked_saved(state, fixed)
        self.residuals.load_state_dict(
            state.get("residuals", {}),
            numels=self._numels(),
            rank=transport.rank,
            world_size=transport.world_size,
            reset_server=reset_server,
        )
        self.step, self.scale = step, scale
