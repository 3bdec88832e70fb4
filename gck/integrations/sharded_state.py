"""What the hook of `gck.integrations.fsdp` keeps from step to step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gck.checkpoint import Loaded, saved_steps
from gck.collectives import Transport, resolve
from gck.collectives.work import perform
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
        """As for a `HookState`, from the directory of the shard. Without `step` collective over all ranks,
        which take the newest step that all shards of all replicas have, in a shared directory or their own.

        Raises:
            StateMismatchError: no step is there of all, but some of some, or some of another number of
                shards; on all ranks.
            Those of `HookState.load`; other ranks may have loaded theirs.
        """
        folder = self._folder(directory)
        if step is None:
            step = self._newest_of_all(Path(directory), folder, shared)
            if step is None:
                return None
        return super().load(folder, step=step, reshard=reshard, server=server, shared=shared)

    def _newest_of_all(self, directory: Path, folder: Path, shared: bool) -> int | None:
        transport = resolve(self.group)
        place = {} if shared else {"rank": transport.rank, "world_size": transport.world_size}
        replica = self._of_replica(saved_steps(folder, **place)[-NEWEST:])
        others = [p.name for p in directory.glob("shard-*-of-*") if p.name[-5:] != folder.name[-5:]]
        found = self.any_of_replica(any(replica) or bool(others))
        rows = _of_group(transport, [int(found), *sorted(set(replica[0]).intersection(*replica))])
        common = set(rows[0][1:]).intersection(*(row[1:] for row in rows))
        if not common and any(row[0] for row in rows):
            raise StateMismatchError(
                f"ShardedHookState.load: {directory} has no step that all shards of all replicas have; those "
                f"of this replica have {replica}" + (f", and there is {others[0]}" if others else "")
            )
        return max(common, default=None)

    def any_of_replica(self, flag: bool) -> bool:
        """Whether it is true on any rank of this one's replica; collective over those."""
        return any(row == [1] for row in self._of_replica([int(flag)]))

    def _of_replica(self, numbers: list[int]) -> list[list[int]]:
        """The numbers, none negative, of each rank of this one's replica; collective over those."""
        own = _packed(numbers).to(self._shards[0].parameters[0].device)
        rows = [torch.empty_like(own) for _ in range(self.shard[1])]
        dist.all_gather(rows, own, group=self._shards[0].group.mesh_info.shard_process_group)
        return [_unpacked(row) for row in rows]

    def _folder(self, directory: str | os.PathLike[str]) -> Path:
        index, count = self.shard
        return Path(directory) / f"shard-{index:05d}-of-{count:05d}"

    def _numels(self) -> dict[str, int]:
        return {
            self._names[id(parameter)]: numel
            for each in self._shards
            for parameter, numel in zip(each.parameters, each.numels, strict=True)
        }

    def check_alive(self, *_: object) -> None:
        """Before a forward pass: FSDP does not survive an error in its hook, and later reduces nothing."""
        if self._failed is not None:
            raise GroupUnusableError(
                f"gck.fsdp: an earlier backward pass failed ({self._failed}), which FSDP does not survive: "
                "make a new model from the parameters, shard and register it, and load the state of this one"
            )


def _of_group(transport: Transport, numbers: list[int]) -> list[list[int]]:
    """The numbers, none negative, of every rank of the group."""
    own = _packed(numbers).view(torch.uint8)

    def run() -> list[list[int]]:
        return [_unpacked(row.contiguous().view(torch.int64)) for row in transport.all_gather_bytes(own)]

    rows = perform(transport, "ShardedHookState.load", run, torch.device("cpu"), False)
    return cast("list[list[int]]", rows)


def _packed(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers + [-1] * (NEWEST + 1 - len(numbers)), dtype=torch.int64, device="cpu")


def _unpacked(row: Tensor) -> list[int]:
    return [number for number in row.tolist() if number >= 0]
