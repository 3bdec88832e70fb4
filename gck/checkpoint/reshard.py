"""Residuals of W ranks become those of W' ranks, and what they will add to the result stays the same.

With op="avg" the results of the future contain, sooner or later,

    (1 / W) * sum over ranks of the worker residual  +  the server residuals, each on its shard,

because a worker residual is sent as a part of one of W gradients whose mean is taken, and a server
residual is added after that. With op="sum" the factor 1 / W is missing.

Worker residuals: see the ranks as a line of length 1, cut into W equal parts, and the residual as a step
function on it. The mean is its integral. Cut into W' parts, each new rank takes the mean of the function
over its part: the integral is the same, and no residual becomes larger than those it is made of. From 4
ranks to 2, pairs are averaged; from 2 to 4, each is taken twice. For sums, each new rank takes W / W' times
that.

Server residuals: their shards side by side are one vector, which is cut again ("keep"), or is added to
the residual of every worker ("fold"; 1 / W' of it for sums).

A basis is the same on all ranks that have one, and goes to all.

Each new worker entry is computed in fp64 and rounded to fp32 once; what is taken from one rank alone is
copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gck.checkpoint.file import StateFile, is_plain
from gck.compressor import shard_numel
from gck.error_feedback import STATE_VERSION
from gck.errors import StateMismatchError

__all__ = ["names_of", "resharded"]


def names_of(files: Sequence[StateFile]) -> list[str]:
    """The tensors of a set: a rank that never used one does not have it.

    Raises:
        StateMismatchError: the files are not of one set.
    """
    first = files[0].header
    for rank, file in enumerate(files):
        for field in ("step", "world_size", "compressor", "scale", "single"):
            one, other = getattr(first, field), getattr(file.header, field)
            if one != other:
                raise StateMismatchError(
                    f"load_state: rank 0 saved with {field} {one!r}, rank {rank} with {other!r}"
                )
    return list(dict.fromkeys(name for file in files for name in file.entries))


def resharded(
    files: Sequence[StateFile], name: str, rank: int, world_size: int, op: str, server: str
) -> dict[str, Any]:
    """The state of one tensor on one rank of the new world, as `ErrorFeedback.load_state_dict` takes it.

    Reads the residuals of this tensor alone, and of no rank that does not contribute.

    Args:
        files: of all ranks that saved, in rank order.
        server: "keep", "fold" or "reset".

    Raises:
        StateMismatchError: the ranks contradict each other, or their residuals are not of all ranks alike.
        CorruptPayloadError: a residual is damaged.
    """
    saved = len(files)
    state: dict[str, Any] = {"version": STATE_VERSION}
    counts = [
        entry.nonfinite
        for old, file in enumerate(files)
        if (entry := file.entries.get(name))
        and entry.nonfinite is not None
        and old * world_size // saved == rank
    ]
    if counts:
        state["nonfinite"] = sum(counts)
    based = next((file for file in files if _has(file, name, "basis")), None)
    if based is not None:
        state |= {"basis": based.tensor(name, "basis"), "columns": based.entries[name].fields["columns"]}
    for old, file in enumerate(files):
        fields = file.entries[name].fields if name in file.entries else {}
        if not is_plain(fields) or (fields.get("rank", old), fields.get("world_size", saved)) != (old, saved):
            raise StateMismatchError(
                f"load_state: the residuals of {name!r} on rank {old} are of another group than all {saved} "
                f"ranks, and cannot be redistributed: {fields}"
            )
    numel, unit = _only(files, name, "numel"), _only(files, name, "unit")
    if numel is None:
        if unit is not None:
            raise StateMismatchError(f"load_state: {name!r} has a server residual and no worker residual")
        return state
    total: Tensor | None = None
    for old, part in _overlaps(saved, world_size, rank):
        if _has(files[old], name, "worker"):
            err = files[old].tensor(name, "worker")
            total = err.double().mul_(part) if total is None else total.add_(err, alpha=part)
    if total is None:
        total = torch.zeros(numel, dtype=torch.float64)
    total.div_(saved if op == "avg" else world_size)
    if unit is not None and server == "keep":
        shard = shard_numel(numel, unit, world_size)
        mine = torch.zeros(shard)
        for start, piece in _server_pieces(files, name, numel, unit, rank * shard, (rank + 1) * shard):
            mine[start - rank * shard :][: piece.numel()] = piece
        state |= {"server": mine, "rank": rank, "world_size": world_size, "unit": unit}
    elif unit is not None and server == "fold":
        for start, piece in _server_pieces(files, name, numel, unit, 0, numel):
            total[start:][: piece.numel()].add_(piece, alpha=1 if op == "avg" else 1 / world_size)
    state["worker"] = total.float()
    return state


def _overlaps(saved: int, world_size: int, rank: int) -> Iterator[tuple[int, int]]:
    """Old ranks that a new rank overlaps, and by how much, of a line of length saved * world_size."""
    begin, end = rank * saved, (rank + 1) * saved
    for old in range(begin // world_size, -(-end // world_size)):
        yield old, min(end, (old + 1) * world_size) - max(begin, old * world_size)


def _server_pieces(
    files: Sequence[StateFile], name: str, numel: int, unit: int, begin: int, end: int
) -> Iterator[tuple[int, Tensor]]:
    """What server residuals hold of elements [begin, end): (first element, values) a shard."""
    shard = shard_numel(numel, unit, len(files))
    for old, file in enumerate(files):
        low, high = max(begin, old * shard), min(end, (old + 1) * shard, numel)
        if low < high and _has(file, name, "server"):
            yield low, file.tensor(name, "server")[low - old * shard : high - old * shard]


def _has(file: StateFile, name: str, kind: str) -> bool:
    return name in file.entries and kind in file.entries[name].crc32


def _only(files: Sequence[StateFile], name: str, field: str) -> int | None:
    """What all ranks that have it say."""
    values = {
        value: rank
        for rank, file in enumerate(files)
        if name in file.entries and (value := getattr(file.entries[name], field)) is not None
    }
    if len(values) > 1:
        said = ", ".join(f"{value} on rank {rank}" for value, rank in sorted(values.items()))
        raise StateMismatchError(f"load_state: {name!r} has another {field} on each rank: {said}")
    return next(iter(values), None)
