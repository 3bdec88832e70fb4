"""One rank's residuals in one safetensors file: written atomically, and read as if a stranger had written it.

The file holds flat fp32 tensors ``worker/<name>``, ``server/<name>`` and ``basis/<name>``. Its metadata are
strings: ``format`` is "gck.state", ``version`` is that of the format, "1" of files without a basis, ``crc32``
is a checksum of ``state``, and that is JSON:

    gck, step, rank, world_size, compressor (or null), scale, single (whether it is one tensor's, named "")
    tensors: {name: {numel, crc32: {worker, server, basis}, fields: {rank, world_size, unit, nonfinite,
        columns}}}, each only where there is one; fields are what `ErrorFeedback.state_dict` has but tensors
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gck.compressor import shard_numel
from gck.error_feedback import STATE_VERSION, is_finite
from gck.errors import BackendUnavailableError, CorruptPayloadError, StateMismatchError
from gck.values import MOST_FP64
from gck.version import __version__

__all__ = [
    "KINDS",
    "MOST_RANKS",
    "MOST_STEPS",
    "RESIDUALS",
    "Entry",
    "Header",
    "StateFile",
    "is_plain",
    "size_problem",
    "sync_directory",
    "write",
]

FORMAT, VERSIONS = "gck.state", ("1", "2")
RESIDUALS = ("worker", "server")
KINDS = (*RESIDUALS, "basis")  # only the former are in units of gradients
MOST_STEPS, MOST_RANKS = 2**63, 2**31  # that a file says: less than these
LARGEST_UNIT = 1 << 24  # elements; shards are allocated in whole units, and chunks are far smaller


@dataclass(frozen=True)
class Header:
    """What a file says of the rank that wrote it.

    Attributes:
        step: of the training.
        compressor: as `gck.compressor.describe` says it, without fields of a step; None: not recorded.
        scale: of the loss; residuals are in units of the gradient times this.
        single: the state is an `ErrorFeedback`, not a map.
    """

    step: int
    rank: int
    world_size: int
    compressor: str | None
    scale: float
    single: bool


class Entry(NamedTuple):
    """What a file says of one tensor.

    Attributes:
        numel: elements of the worker residual; None where there is none.
        crc32: checksums of the bytes, by kind.
        fields: what else its state has: ints, and dicts of ints.
    """

    numel: int | None
    crc32: dict[str, int]
    fields: dict[str, Any]

    @property
    def unit(self) -> int | None:
        """Of the server residual's binding; None where there is none."""
        return self.fields.get("unit")

    @property
    def nonfinite(self) -> int | None:
        """The counter; None where it was never used."""
        return self.fields.get("nonfinite")


def is_plain(state: Mapping[str, Any]) -> bool:
    """Whether residuals belong to the whole tensor and all ranks: what else a state has says otherwise."""
    return set(state) <= {"version", *KINDS, "rank", "world_size", "unit", "nonfinite", "columns"}


def size_problem(fields: Mapping[str, Any], numel: int, server_numel: int, world_size: int) -> str | None:
    """What is wrong with the size of a server residual beside a worker's of `numel`; None: nothing that can
    be told."""
    if fields["world_size"] != world_size:  # of nodes
        return None
    if not 1 <= fields["unit"] < LARGEST_UNIT:
        return f"in units of {fields['unit']} elements, of at most {LARGEST_UNIT - 1}"
    shard = shard_numel(numel, fields["unit"], world_size)
    return None if server_numel == shard else f"of {server_numel} elements; a shard has {shard}"


def write(path: Path, header: Header, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `path` so that whoever is killed meanwhile leaves the old file, or the new one, whole.

    The bytes go to a temporary file beside it, to the disk, and only then to their name; then the
    directory goes to the disk.

    Args:
        states: what `ErrorFeedback.state_dict` returns, by name.

    Raises:
        OSError: the file cannot be written; what was there is as it was.
    """
    library = _safetensors()
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, state in states.items():
        crc32: dict[str, int] = {}
        fields = {key: value for key, value in state.items() if key not in (*KINDS, "version")}
        entry: dict[str, Any] = {"crc32": crc32, "fields": _fields(fields)}
        for kind in KINDS:
            if kind in state:
                flat = tensors[f"{kind}/{name}"] = state[kind].detach().cpu().contiguous()
                crc32[kind] = _crc32(flat)
        if "worker" in state:
            entry["numel"] = state["worker"].numel()
        described[name] = entry
    text = json.dumps({"gck": __version__} | asdict(header) | {"tensors": described})
    # Always the same name for a rank, so that what a killed save leaves is overwritten by the next.
    temporary = path.with_name(f".gck-rank-{header.rank:05d}-of-{header.world_size:05d}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        version = VERSIONS[any("basis" in state for state in states.values())]
        metadata = {"format": FORMAT, "version": version, "state": text, "crc32": _checksum(text)}
        try:
            library.torch.save_file(tensors, temporary, metadata)
        except library.SafetensorError as error:
            raise OSError(f"save_state: {temporary} could not be written: {error}") from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Returns when the names in `directory` are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StateFile:
    """An open file; everything but the tensors' content has been checked.

    Attributes:
        header, entries: what it says.

    Raises:
        CorruptPayloadError: it is damaged, or contradicts itself.
        StateMismatchError: it is of another version of the format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        library = _safetensors()
        self.path = path
        try:
            self._file = library.safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
            keys = set(self._file.keys())
        except library.SafetensorError as error:
            raise self._corrupt(f"is no safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise self._corrupt(f"has format {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("version") not in VERSIONS:
            raise StateMismatchError(
                f"load_state: {path} has version {metadata.get('version')!r} of the format, this gck reads "
                f"{', '.join(VERSIONS)}"
            )
        text = metadata.get("state", "")
        if metadata.get("crc32") != _checksum(text):
            raise self._corrupt("has damaged metadata: their checksum is another")
        try:
            parsed = json.loads(text)
            self.header = _header(parsed)
            self.entries = {name: self._entry(name, entry) for name, entry in parsed["tensors"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, CorruptPayloadError):
                raise
            raise self._corrupt(f"has malformed metadata ({error!r})") from error
        known = {f"{kind}/{name}" for name, entry in self.entries.items() for kind in entry.crc32}
        if self.header.single and set(self.entries) != {""}:
            raise self._corrupt(f"is that of one tensor, and names {sorted(self.entries)[:3]}")
        if keys != known:
            raise self._corrupt(f"holds tensors that its metadata lack: {sorted(keys - known)[:3]}")

    def tensor(self, name: str, kind: str) -> Tensor:
        """The (numel,) fp32 residual, checked; a view of the file.

        Raises:
            CorruptPayloadError: its bytes are not what was written, or not finite.
        """
        flat: Tensor = self._file.get_tensor(f"{kind}/{name}")
        if _crc32(flat) != self.entries[name].crc32[kind]:
            raise self._corrupt(f"has a damaged {kind} residual of {name!r}: its checksum is another")
        if not is_finite(flat):
            raise self._corrupt(f"has a {kind} residual of {name!r} that is not finite")
        return flat

    def state(self, name: str) -> dict[str, Any]:
        """What `ErrorFeedback.load_state_dict` takes."""
        entry = self.entries[name]
        tensors = {kind: self.tensor(name, kind) for kind in entry.crc32}
        return {"version": STATE_VERSION} | entry.fields | tensors

    def _entry(self, name: str, entry: dict[str, Any]) -> Entry:
        """Checks what the metadata say of a tensor against what the file holds of it."""
        crc32 = {kind: _integer(crc, 0, 2**32) for kind, crc in entry["crc32"].items()}
        sizes: dict[str, int] = {}
        for kind in crc32:
            if kind not in KINDS:
                raise self._corrupt(f"says that {name!r} has a {kind!r} residual")
            try:
                view = self._file.get_slice(f"{kind}/{name}")
            except Exception as error:  # of the library, which has none of its own for this
                raise self._corrupt(f"lacks the {kind} residual of {name!r}") from error
            shape, dtype = view.get_shape(), view.get_dtype()
            if dtype != "F32" or len(shape) != 1:
                raise self._corrupt(f"has a {kind} residual of {name!r} that is {dtype} {shape}")
            sizes[kind] = shape[0]
        numel, fields = entry.get("numel"), _fields(entry["fields"])
        if numel != sizes.get("worker"):
            raise self._corrupt(f"says that {name!r} has {numel} elements, and holds {sizes.get('worker')}")
        checked = Entry(numel, crc32, fields)
        columns, held = fields.get("columns"), sizes.get("basis")
        if not (columns is held is None or (columns and held and held % columns == 0)):
            raise self._corrupt(f"says that {name!r} has a basis in rows of {columns}, and holds {sizes}")
        if ("unit" in fields) != ("server" in sizes):
            raise self._corrupt(f"says that {name!r} has a unit of {checked.unit}, and holds {sorted(sizes)}")
        if "unit" in fields and numel is not None:
            problem = size_problem(fields, numel, sizes["server"], self.header.world_size)
            if problem:
                raise self._corrupt(f"has a server residual of {name!r} {problem}")
        return checked

    def _corrupt(self, what: str) -> CorruptPayloadError:
        return CorruptPayloadError(f"load_state: {self.path} {what}")


def _header(parsed: Any) -> Header:
    compressor, scale, single = parsed["compressor"], parsed["scale"], parsed["single"]
    if not (compressor is None or isinstance(compressor, str)) or not isinstance(single, bool):
        raise TypeError(f"compressor {compressor!r}, single {single!r}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= MOST_FP64:
        raise ValueError(f"scale {scale!r}")
    step, world_size = _integer(parsed["step"], 0, MOST_STEPS), _integer(parsed["world_size"], 1, MOST_RANKS)
    rank = _integer(parsed["rank"], 0, world_size)
    return Header(step, rank, world_size, compressor, float(scale), single)


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Checks that they are ints, and dicts of ints, which is all that the file holds beside tensors."""
    return {
        key: _fields(value) if isinstance(value, dict) else _integer(value, 0, 2**63)
        for key, value in fields.items()
        if isinstance(key, str) and key not in (*KINDS, "version")
    }


def _crc32(flat: Tensor) -> int:
    content: Any = flat.numpy()
    return zlib.crc32(content)


def _checksum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def _integer(value: object, low: int, end: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < end:
        raise ValueError(f"{value!r} is no integer from {low} up to {end}")
    return value


def _safetensors() -> Any:
    """The library, imported on first use: nothing else of gck needs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise BackendUnavailableError(
            "saving and loading residuals needs safetensors and numpy: pip install safetensors numpy"
        ) from error
    return safetensors
