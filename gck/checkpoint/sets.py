"""Which files of a directory belong together, which of them are complete, and which may go.

The ranks of one save never wait for one another, so that a crash may find rank 0 at step 100 and rank 1
at step 90. Files are named by step, rank and world size; those of one step and world size are a set, and
a set is complete when the file of every rank is there. Each file has reached the disk before it gets its
name, so that a complete set stays one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gck.checkpoint.file import sync_directory

__all__ = ["StateSet", "abandon", "complete_sets", "path_of", "prune", "state_sets"]

NAME = re.compile(r"gck-(\d{12,19})-rank-(\d{5,10})-of-(\d{5,10})\.safetensors")


class StateSet(NamedTuple):
    """The files of one step and world size.

    Attributes:
        missing: ranks whose file is not there.
    """

    step: int
    world_size: int
    missing: tuple[int, ...]


def path_of(directory: Path, step: int, rank: int, world_size: int) -> Path:
    """The file of one rank."""
    return directory / f"gck-{step:012d}-rank-{rank:05d}-of-{world_size:05d}.safetensors"


def lone_steps(directory: Path) -> list[int]:
    """All steps, if files of the same ranks are there of each, and others' of none."""
    ranks = _ranks(directory)
    present = {(world_size, *sorted(there)) for (_, world_size), there in ranks.items()}
    incomplete = all(len(there) < world_size for (_, world_size), there in ranks.items())
    return sorted({step for step, _ in ranks}) if incomplete and len(present) == 1 else []


def _ranks(directory: Path) -> dict[tuple[int, int], set[int]]:
    """(step, world size) -> ranks whose files are there."""
    ranks: dict[tuple[int, int], set[int]] = {}
    for _, step, rank, world_size in _files(directory):
        ranks.setdefault((step, world_size), set()).add(rank)
    return ranks


def state_sets(directory: Path) -> list[StateSet]:
    """All sets, complete or not; the oldest step first."""
    ranks = _ranks(directory)
    return [
        # A name may say any world size: only as many ranks as there are files are gone through.
        StateSet(step, world_size, _missing(present, world_size))
        for (step, world_size), present in sorted(ranks.items())
    ]


def complete_sets(directory: Path) -> list[StateSet]:
    """The sets that can be loaded; the oldest step first."""
    return [found for found in state_sets(directory) if not found.missing]


def prune(directory: Path, rank: int, world_size: int, keep: int, shared: bool) -> None:
    """Removes files of this rank that are older than the `keep` newest sets.

    In a shared directory those are the newest *complete* sets, and nothing is removed before there are as
    many: the last complete set is never touched. What makes them complete may be the name that another rank
    has just given to its file, so the directory goes to the disk before the first older file is removed.

    In a directory of this rank alone nobody can tell; its newest files are kept. See `save_state`.
    """
    steps = _steps(directory, rank, world_size, shared)
    if len(steps) < keep:
        return
    oldest = steps[-keep]
    old = [path for path, step in _own(directory, rank, world_size, shared) if step < oldest]
    if old:
        sync_directory(directory)
    for path in old:
        path.unlink(missing_ok=True)


def later_steps(directory: Path, step: int, rank: int, world_size: int, keep: int, shared: bool) -> list[int]:
    """Steps after `step` that another run has left, next to which it must not be saved.

    This run has none of which all ranks have files: `load_state` removes them. In a directory of this rank
    alone nobody can tell; those are too many that would push out what is saved.
    """
    later = [other for other in _steps(directory, rank, world_size, shared) if other > step]
    return later if shared or len(later) >= keep else []


def abandon(directory: Path, step: int, rank: int, world_size: int, shared: bool) -> None:
    """Removes files of this rank of later steps than `step`.

    The run that wrote them ends here. Left behind, one of them could complete a set of the run that begins,
    whose other files it does not fit.
    """
    later = [path for path, other in _own(directory, rank, world_size, shared) if other > step]
    for path in later:
        path.unlink(missing_ok=True)
    if later:
        sync_directory(directory)


def _steps(directory: Path, rank: int, world_size: int, shared: bool) -> list[int]:
    """Those of complete sets; in a directory of this rank alone, those of its files. The oldest first."""
    if shared:
        return [found.step for found in complete_sets(directory)]
    files = _files(directory)
    return sorted(step for _, step, owner, world in files if (owner, world) == (rank, world_size))


def _files(directory: Path) -> Iterator[tuple[Path, int, int, int]]:
    """Path, step, rank and world size of each file that has a name of ours."""
    # A directory that is not there holds nothing; a file in its place is an error of whoever named it.
    for path in directory.iterdir() if directory.exists() else ():
        match = NAME.fullmatch(path.name)
        if match is None:
            continue
        step, rank, world_size = map(int, match.groups())
        if rank < world_size and path == path_of(directory, step, rank, world_size):
            yield path, step, rank, world_size


def _own(directory: Path, rank: int, world_size: int, shared: bool) -> list[tuple[Path, int]]:
    """Path and step of the files that this rank may remove: its own, and of sets of other world sizes those
    that fall to it, so that each file falls to one rank."""
    return [
        (path, step)
        for path, step, owner, world in _files(directory)
        if (owner if world == world_size else owner % world_size) == rank and (shared or world == world_size)
    ]


def _missing(present: set[int], world_size: int) -> tuple[int, ...]:
    if len(present) == world_size:
        return ()
    # Enough of them to name; a file's name may claim a world of any size.
    return tuple(rank for rank in range(min(world_size, len(present) + 8)) if rank not in present)
