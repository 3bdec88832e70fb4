"""Residuals on disk: one file a rank, complete sets of them, and worlds of another size.

    gck.save_state("state", residuals, rank=rank, world_size=world_size, step=step, compressor=compressor)
    loaded = gck.load_state("state", residuals, rank=rank, world_size=world_size, compressor=compressor)

docs/reliability.md has the format and the promises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gck.checkpoint.checks import check_apart, check_loads
from gck.checkpoint.file import (
    MOST_RANKS,
    MOST_STEPS,
    RESIDUALS,
    Header,
    StateFile,
    sync_directory,
    write,
)
from gck.checkpoint.reshard import names_of, resharded
from gck.checkpoint.sets import (
    StateSet,
    abandon,
    complete_sets,
    later_steps,
    lone_steps,
    path_of,
    prune,
    state_sets,
)
from gck.compressor_choice import Choosable, CompressorChoice
from gck.error_feedback import (
    STATE_VERSION,
    ErrorFeedback,
    ErrorFeedbackMap,
    check_factor,
    check_scaled,
    multiply_,
)
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError, StateMismatchError
from gck.values import check_flags, plain_int, shown

__all__ = ["Loaded", "load_state", "save_state", "saved_steps"]

SERVER = ("keep", "fold", "reset")


class Loaded(NamedTuple):
    """What `load_state` returns.

    Attributes:
        step: that the residuals are of.
        scale: of the loss; residuals are in units of the gradient times this.
        world_size: ranks that saved.
    """

    step: int
    scale: float
    world_size: int


def save_state(
    directory: str | os.PathLike[str],
    state: ErrorFeedback | ErrorFeedbackMap,
    *,
    rank: int,
    world_size: int,
    step: int,
    compressor: Choosable | None = None,
    scale: float = 1.0,
    keep: int = 2,
    shared: bool = True,
) -> Path:
    """Writes this rank's residuals of one step; every rank calls it, none waits for another.

    A process that is killed at any moment leaves each file as it was, or new and whole. Files of a step
    are a set that counts once all ranks' are there. This rank's files that are older than the `keep` newest
    complete sets are removed, after the newest has reached the disk.

    Save what belongs to the residuals, the model and the optimizer, under the same step and *before* this:
    then a complete set has them beside it.

    Args:
        directory: made where it is missing. Of one training run.
        state: read only; on any device, from which all of it is copied to the host.
        step: of the training, at least 0. A file of the same step is replaced.
        compressor: that the residuals are of, or those by name, as for `gck.ddp.HookState`; `load_state`
            compares it.
        scale: of the loss, where it is scaled: residuals are in units of the scaled gradient.
        keep: complete sets that stay, at least 1.
        shared: all ranks see the same directory. False: each has its own, and its `keep` newest files
            stay, at least 2: ranks that exchange something at every step are never more than one save apart,
            so that the newest set that all of them have is among those.

    Returns:
        The file.

    Raises:
        ArgumentError, DtypeError: an argument is out of range or of a wrong type.
        StateMismatchError: a server residual belongs to another rank or world size, or a residual is not
            finite, which `load_state` would refuse, or shares memory with another, or the directory holds
            later steps, which `load_state` would have removed; nothing was written or removed.
        BackendUnavailableError: safetensors or numpy is missing.
        OSError: the file cannot be written; the older ones are as they were.
    """
    function = "save_state"
    rank, world_size, step = _checked_place(function, rank, world_size, step)
    check_flags(function, shared=shared)
    described = None if compressor is None else CompressorChoice(function, compressor).describe()
    scale, keep = check_factor(function, scale, "scale"), plain_int(keep)
    least = 1 if shared else 2
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < least:
        raise ArgumentError(f"{function}: keep must be at least {least} with shared={shared}, got {keep!r}")
    states = {}
    for name, one in _states(function, state).items():
        states[name] = one.state_dict()
        check_loads(name, states[name], one.place(), (rank, world_size))
    check_apart(states)
    folder = Path(directory)
    if later := later_steps(folder, step, rank, world_size, keep, shared):
        raise StateMismatchError(
            f"{function}: {folder} holds later steps than {step}: {later}, of another run, or of this one "
            "before it was started anew; take another directory, or go on with load_state"
        )
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in made:
        sync_directory(parent.parent)
    path = path_of(folder, step, rank, world_size)
    header = Header(step, rank, world_size, described, scale, isinstance(state, ErrorFeedback))
    write(path, header, states)
    prune(folder, rank, world_size, keep, shared)
    return path


def load_state(
    directory: str | os.PathLike[str],
    state: ErrorFeedback | ErrorFeedbackMap,
    *,
    rank: int,
    world_size: int,
    compressor: Choosable | None = None,
    step: int | None = None,
    numels: Mapping[str, int] | int | None = None,
    scale: float | None = None,
    reshard: bool = False,
    op: str = "avg",
    server: str = "keep",
    shared: bool = True,
    read_only: bool = False,
) -> Loaded | None:
    """Replaces the residuals by those of the newest step that all ranks have saved.

    Every rank calls it, with the same arguments but its rank, before any of them saves again. Residuals are
    read one tensor at a time.

    Args:
        directory: that of `save_state`.
        state: replaced; of the same type as was saved.
        compressor: must be that which was saved, but for fields that are others at every step.
        step: load this one instead of the newest; must be given where `shared` is false.
        numels: elements of each gradient by name (of the gradient, for an `ErrorFeedback`); a saved name that
            it lacks and another size are errors. It may have names that were not saved: what was never
            compressed has no residuals.
        scale: of the loss from now on; residuals that were saved under another one are rescaled, as by
            `ErrorFeedback.rescale_`. Default: they stay as saved.
        reshard: allow that another number of ranks has saved. Needs a shared directory.
        op: how gradients are reduced, "avg" or "sum": what a reshard must preserve.
        server: what becomes of server residuals. "keep": they stay, cut for the new shards. "fold": they are
            added to the workers', which fits every compressor and algorithm; needs a shared directory.
            "reset": they are dropped. Any but "keep" allows another compressor.
        shared: all ranks see the same directory.
        read_only: leave this rank's files of later steps. By default they are removed, since the run that
            wrote them ends here: one of them might complete a set of this run.

    Returns:
        Step, scale and world size; None where there is nothing to load: no complete set, and no `step` was
        asked for.

    Raises:
        ArgumentError, DtypeError: an argument is out of range or of a wrong type, or a residual would not be
            finite under `scale`.
        StateMismatchError: three steps or more are of the same ranks alone, so that nobody shares it; or what
            was saved belongs to another model, compressor, world size or kind of state, or the step is not
            complete; says what differs.
        CorruptPayloadError: a file is damaged; an older step may be whole.
        BackendUnavailableError: safetensors or numpy is missing.
        OSError: a file cannot be read, or directory is none.

        After any error the residuals are as they were, and no file was removed; but for an error in removing
        files, which comes last.
    """
    function = "load_state"
    rank, world_size, asked = _checked_place(function, rank, world_size, 0 if step is None else step)
    step = None if step is None else asked
    check_flags(function, reshard=reshard, shared=shared, read_only=read_only)
    described = None if compressor is None else CompressorChoice(function, compressor).describe()
    if scale is not None:
        scale = check_factor(function, scale, "scale")
    for name, value, allowed in (("op", op, ("avg", "sum")), ("server", server, SERVER)):
        if value not in allowed:
            raise ArgumentError(f"{function}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if not shared and (step is None or reshard or server == "fold"):
        raise ArgumentError(
            f"{function}: a directory of one rank (shared=False) needs step=, and lacks others' files for "
            f'reshard=True and server="fold"; got step={step}, reshard={reshard}, server={server!r}'
        )
    _states(function, state)
    wanted = int if isinstance(state, ErrorFeedback) else Mapping
    if numels is not None and not isinstance(numels, wanted):
        raise DtypeError(
            f"{function}: numels must be an int for an ErrorFeedback and a dict for a map, got {numels!r}"
        )
    folder = Path(directory)
    chosen = _choose(folder, step, world_size) if shared else StateSet(step or 0, world_size, ())
    if chosen is None:
        return None
    if chosen.world_size != world_size and not reshard:
        raise StateMismatchError(
            f"{function}: step {chosen.step} was saved by {chosen.world_size} ranks, this world has "
            f"{world_size}; reshard=True redistributes the residuals"
        )
    whole = chosen.world_size == world_size and server != "fold"
    owners = [rank] if whole else range(chosen.world_size)
    files = [_open(folder, chosen, owner) for owner in owners]
    names = names_of(files)
    _check_header(files[0].header, state, described, server)

    was = files[0].header.scale
    factor = check_factor(function, (scale or was) / was, f"scale / {was}")

    def saved(name: str) -> dict[str, Any]:
        one = files[0].state(name) if whole else resharded(files, name, rank, world_size, op, server)
        kinds = RESIDUALS[:1] if server == "reset" else RESIDUALS
        return one if factor == 1 else _scaled(name, one, factor, kinds)

    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "reset_server": server == "reset"}
    if isinstance(state, ErrorFeedback):
        state.load_state_dict(saved(""), numel=numels if isinstance(numels, int) else None, **options)
    else:
        tensors = {"version": STATE_VERSION, "tensors": _Lazy(names, saved)}
        state.load_state_dict(tensors, numels=numels if isinstance(numels, Mapping) else None, **options)
    if not read_only:
        abandon(folder, chosen.step, rank, world_size, shared)
    return Loaded(chosen.step, was if scale is None else float(scale), chosen.world_size)


def saved_steps(
    directory: str | os.PathLike[str], *, rank: int | None = None, world_size: int | None = None
) -> list[int]:
    """Steps that can be loaded, the oldest first: those that all ranks have saved.

    Args:
        rank: count this rank's files alone, as in a directory of its own; needs world_size.
        world_size: count what so many ranks have saved. Default: any number.

    Raises:
        ArgumentError, DtypeError: rank or world_size is out of range or no int.
    """
    if rank is not None:
        rank, world_size, _ = _checked_place("saved_steps", rank, world_size, 0)
    elif world_size is not None:
        _, world_size, _ = _checked_place("saved_steps", 0, world_size, 0)
    return sorted(
        {
            found.step
            for found in state_sets(Path(directory))
            if world_size in (None, found.world_size)
            and (rank not in found.missing if rank is not None else not found.missing)
        }
    )


def _scaled(name: str, state: dict[str, Any], factor: float, kinds: Iterable[str]) -> dict[str, Any]:
    """A state with copies of its residuals times `factor`."""
    residuals = {kind: state[kind] for kind in kinds if kind in state}
    named = {f"{kind} residual of {name!r}": residual for kind, residual in residuals.items()}
    check_scaled("load_state", named, factor)
    for kind, residual in residuals.items():
        state[kind] = residual.clone()
        multiply_(state[kind], factor)
    return state


class _Lazy(Mapping[str, Any]):
    """Reads a tensor's state when it is asked for, so that only one is held."""

    def __init__(self, names: list[str], read: Callable[[str], dict[str, Any]]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _choose(directory: Path, step: int | None, world_size: int) -> StateSet | None:
    """The newest complete set, or that of `step`; of two of one step, that of this world size."""
    sets = complete_sets(directory)
    wanted = [found for found in sets if step in (None, found.step)]
    if wanted:
        return max(wanted, key=lambda found: (found.step, found.world_size == world_size, found.world_size))
    if step is None:
        _check_shared(directory)
        return None
    partial = [found for found in state_sets(directory) if found.step == step]
    why = "; ".join(f"of {p.world_size} ranks, {list(p.missing)} are missing" for p in partial)
    raise StateMismatchError(
        f"load_state: step {step} is not complete in {directory} ({why or 'no file'}); complete steps: "
        f"{sorted({found.step for found in sets})}"
    )


def _check_shared(directory: Path) -> None:
    """Ranks are one save apart at most, and rarely killed there twice: else others write elsewhere."""
    alone = lone_steps(directory)
    if len(alone) > 2:
        raise StateMismatchError(
            f"load_state: {directory} has files of the same ranks alone of every step ({alone}); where each "
            "rank has a directory of its own, save and load with shared=False, and load with step="
        )


def _open(directory: Path, chosen: StateSet, rank: int) -> StateFile:
    path = path_of(directory, chosen.step, rank, chosen.world_size)
    try:
        file = StateFile(path)
    except FileNotFoundError as error:
        raise StateMismatchError(f"load_state: {path} does not exist") from error
    said = (file.header.step, file.header.rank, file.header.world_size)
    if said != (chosen.step, rank, chosen.world_size):
        raise CorruptPayloadError(
            f"load_state: {path} was written as step {said[0]} of rank {said[1]} of {said[2]}: it was renamed"
        )
    return file


def _check_header(
    header: Header, state: ErrorFeedback | ErrorFeedbackMap, described: str | None, server: str
) -> None:
    if header.single != isinstance(state, ErrorFeedback):
        kinds = ("an ErrorFeedbackMap", "an ErrorFeedback")
        raise StateMismatchError(
            f"load_state: {kinds[header.single]} was saved, got {kinds[not header.single]}"
        )
    if server == "keep" and header.compressor != described:
        raise StateMismatchError(
            f"load_state: saved by compressor {header.compressor}, this is {described}; "
            'server="fold" keeps all residuals for another compressor'
        )


def _states(function: str, state: object) -> dict[str, ErrorFeedback]:
    if isinstance(state, ErrorFeedback):
        return {"": state}
    if isinstance(state, ErrorFeedbackMap):
        return dict(state.items())
    raise DtypeError(f"{function}: state must be an ErrorFeedback or an ErrorFeedbackMap, got {shown(state)}")


def _checked_place(function: str, rank: Any, world_size: Any, step: Any) -> tuple[int, int, int]:
    """All three as plain ints, if they are in range."""
    rank, world_size, step = plain_int(rank), plain_int(world_size), plain_int(step)
    for name, value, least, end in (
        ("world_size", world_size, 1, MOST_RANKS),
        ("rank", rank, 0, world_size),
        ("step", step, 0, MOST_STEPS),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{function}: {name} must be an int, got {shown(value)}")
        if not least <= value < end:
            of = f" of world size {world_size}" if name == "rank" else ""
            raise ArgumentError(f"{function}: {name} out of range, got {value}{of}")
    return rank, world_size, step
