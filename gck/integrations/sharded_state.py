"""What the hook of `gck.integrations.fsdp` keeps from step to step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gck.checkpoint import Loaded, saved_steps
from gck.compressor_choice import Choosable
from gck.error_feedback import check_version
from gck.errors import ArgumentError, GroupUnusableError, StateMismatchError
from gck.integrations.hook_state import HookState
from gck.integrations.shards import Shards

__all__ = ["ShardedHookState"]

NEWEST = 16  # steps that shards compare: they are hardly ever more than one save apart


class ShardedHookState(HookState):
    """What the hook keeps from step to step: a `HookState` whose residuals are of this rank's shards.

    They belong to their shard: `state_dict` says which it is, and `save` writes to a directory for each,
    "shard-00001-of-00002" in the given one, which is where `load` looks.

    Attributes:
        step: the reductions of the group of parameters that had most, warm-up included.
        shard: (index, count) of this rank's among those of a replica.
    """

    def __init__(self, shards: Sequence[Shards], compressor: Choosable, *args: Any, **options: Any) -> None:
        self._shards = shards
        self._failed: str | None = None
        self.shard = shards[0].place
        super().__init__(compressor, *args, overlap=False, **options)

    @property
    def step(self) -> int:
        return max(each.reductions for each in self._shards)

    @step.setter
    def step(self, value: int) -> None:
        for each in self._shards:
            each.reductions = value

    def bind(self, model: torch.nn.Module) -> None:
        """Learns the parameters' names, of the model that was registered, while it is sharded.

        Raises:
            ArgumentError: it has not the same parameters. Those of `HookState.bind`.
        """
        present = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in present for each in self._shards for parameter in each.parameters):
            raise ArgumentError(
                "ShardedHookState.bind: model is not the one that was registered, or is not sharded now"
            )
        super().bind(model)

    def state_dict(self) -> dict[str, Any]:
        """As that of a `HookState`, with the shard."""
        return super().state_dict() | {"shard": list(self.shard)}

    def load_state_dict(self, state: Mapping[str, Any], *, reset_server: bool = False) -> None:
        """As for a `HookState`; a StateMismatchError as well where the state is of another shard."""
        check_version("ShardedHookState.load_state_dict", state)
        if state.get("shard") != list(self.shard):
            raise StateMismatchError(
                f"ShardedHookState.load_state_dict: the saved state belongs to shard {state.get('shard')} "
                f"(index, count), this is {list(self.shard)}; every rank saves and loads its own"
            )
        super().load_state_dict(state, reset_server=reset_server)

    def save(self, directory: str | os.PathLike[str], *, keep: int = 2, shared: bool = True) -> Path:
        """As for a `HookState`, to the directory of the shard; returns the file."""
        return super().save(self._folder(directory), keep=keep, shared=shared)

    def load(
        self,
        directory: str | os.PathLike[str],
        *,
        step: int | None = None,
        reshard: bool = False,
        server: str = "keep",
        shared: bool = True,
    ) -> Loaded | None:
        """As for a `HookState`, from the directory of the shard. Without `step` collective over the ranks of
        a replica, which take the newest step that all shards have.

        Raises:
            StateMismatchError: no step is there of all shards, but some of some.
            Those of `HookState.load`; other ranks may have loaded theirs.
        """
        folder = self._folder(directory)
        if step is None and shared:
            steps = self._steps_of_all_shards(folder)
            common = set(steps[0]).intersection(*steps)
            if not common and any(steps):
                raise StateMismatchError(
                    f"ShardedHookState.load: {directory} has no step of all shards; they have {steps}"
                )
            step = max(common, default=None)
        return super().load(folder, step=step, reshard=reshard, server=server, shared=shared)

    def _steps_of_all_shards(self, folder: Path) -> list[list[int]]:
        """The newest steps that each shard of the replica has; collective over its ranks."""
        device = self._shards[0].parameters[0].device
        newest = saved_steps(folder)[-NEWEST:]
        own = torch.tensor(newest + [-1] * (NEWEST - len(newest)), dtype=torch.int64, device=device)
        rows = [torch.empty_like(own) for _ in range(self.shard[1])]
        dist.all_gather(rows, own, group=self._shards[0].group.mesh_info.shard_process_group)
        return [[step for step in row.tolist() if step >= 0] for row in rows]

    def _folder(self, directory: str | os.PathLike[str]) -> Path:
        index, count = self.shard
        return Path(directory) / f"shard-{index:05d}-of-{count:05d}"

    def _numels(self) -> dict[str, int]:
        return {
            self._names[id(parameter)]: numel
            for each in self._shards
            for parameter, numel in zip(each.parameters, each.numels, strict=True)
        }

    def _check_alive(self, *_: object) -> None:
        """Before a forward pass: FSDP does not survive an error in its hook, and later reduces nothing."""
        if self._failed is not None:
            raise GroupUnusableError(
                f"gck.fsdp: an earlier backward pass failed ({self._failed}), which FSDP does not survive: "
                "make a new model from the parameters, shard and register it, and load the state of this one"
            )
