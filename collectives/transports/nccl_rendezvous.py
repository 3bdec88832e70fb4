"""How ranks find NCCL, and each other: the library's place, and the unique id on its way to every rank.

The unique id lets whoever holds it join the communicator: it travels through the group or the store that
the ranks share, is deleted from a store once all have joined, and appears in no text.

Each rank makes a card, little-endian: 4 magic "GCKN", 1 whether it has the library, 4 the library's version,
4 world size, 128 the unique id (rank 0's own; zero on others). All read everybody's, so all see the same
differences and raise the same error, before anything could wait for a rank that will not come.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gck._native import load
from gck.collectives.transports import Transport
from gck.collectives.transports.failures import typed_error
from gck.errors import (
    BackendUnavailableError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GckError,
)

__all__ = ["NcclLibrary", "exchange_by_group", "exchange_by_store", "nccl_library", "wheels"]

CARD = struct.Struct("<4s?iI128s")
MAGIC = b"GCKN"
POLL = 0.002  # seconds between two looks into a store


class NcclLibrary(NamedTuple):
    """The library of this process.

    Attributes:
        version: as in "2.18.1".
        path: of the file.
        origin: how it was found: "GCK_NCCL_LIBRARY", "process" (loaded already), "wheel" or "system".
    """

    version: str
    path: str
    origin: str


def nccl_library() -> NcclLibrary:
    """Opens NCCL, if this process has not yet, and says which.

    Raises:
        BackendUnavailableError: it is not installed, too old or incomplete, or gck was not built.
    """
    code, path, origin = load().nccl_open(wheels())
    return NcclLibrary(_version_text(code), path, origin)


def wheels() -> list[str]:
    """Where an installed nvidia-nccl wheel has the library."""
    try:
        spec = find_spec("nvidia.nccl")
    except ImportError:  # no package of NVIDIA's at all
        return []
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / "lib" / "libnccl.so.2" for folder in folders]
    return [str(file) for file in files if file.exists()]


def exchange_by_group(transport: Transport) -> bytes:
    """The unique id, the same on all ranks; in rank 0's library it is made.

    Raises:
        BackendUnavailableError: a rank has no NCCL; on all ranks.
        CollectiveMismatchError: ranks differ in NCCL's version; on all ranks.
        PeerLostError, CollectiveTimeoutError: of the transport.
    """
    card, error = _own_card(transport.rank, transport.world_size)
    rows = transport.all_gather_bytes(torch.frombuffer(bytearray(card), dtype=torch.uint8))
    return _read([bytes(row.tolist()) for row in rows], error)


def exchange_by_store(
    store: Any, rank: int, world_size: int, name: str, timeout: float
) -> tuple[bytes, Callable[[], None]]:
    """As `exchange_by_group`, through a torch.distributed Store under the prefix `name`.

    Returns:
        The unique id, and what deletes it from the store; to be called once all ranks have joined.
    """
    card, error = _own_card(rank, world_size)
    try:
        if rank == 0:
            key = _offer(store, card, world_size, name, timeout)
        else:
            key = _answer(store, card, rank, world_size, name, timeout)
        cards = store.get(f"{key}/cards")
    except (RuntimeError, OSError) as raised:
        if isinstance(raised, GckError):
            raise
        failure = typed_error(f"store on rank {rank} of {world_size}", raised, timeout)
        raise failure if failure is not None else raised from raised
    if len(cards) % CARD.size:
        raise CollectiveError(f"NcclCommunicator: the store's {name!r} is used by something else")

    def forget() -> None:
        if rank == 0:
            store.delete_key(f"{key}/cards")

    rows = [cards[start : start + CARD.size] for start in range(0, len(cards), CARD.size)]
    return _read(rows, error), forget


def _offer(store: Any, card: bytes, world_size: int, name: str, timeout: float) -> str:
    """Rank 0 opens an attempt, of a number that none before had, and publishes all cards once they are
    there; returns the prefix of its keys."""
    attempt = store.add(f"{name}/attempts", 1)
    key = f"{name}/{attempt}"
    store.set(f"{name}/open", str(attempt))
    others = [f"{key}/{other}" for other in range(1, world_size)]
    if others:
        store.wait(others, timedelta(seconds=timeout))
    store.set(f"{key}/cards", card + b"".join(store.get(other) for other in others))
    return key


def _answer(store: Any, card: bytes, rank: int, world_size: int, name: str, timeout: float) -> str:
    """Another rank answers the attempt that is open, and a later one if rank 0 gives up and tries again;
    returns the prefix of its keys once all cards are there. It answers none that it has had the cards of."""
    deadline = time.monotonic() + timeout
    had = int(store.get(f"{name}/{rank}/had")) if store.check([f"{name}/{rank}/had"]) else 0
    answered = had
    while time.monotonic() < deadline:
        attempt = int(store.get(f"{name}/open")) if store.check([f"{name}/open"]) else 0
        if attempt > answered:
            store.set(f"{name}/{attempt}/{rank}", card)
            answered = attempt
        if answered > had and store.check([f"{name}/{answered}/cards"]):
            store.set(f"{name}/{rank}/had", str(answered))
            return f"{name}/{answered}"
        time.sleep(POLL)
    raise CollectiveTimeoutError(f"store on rank {rank} of {world_size}: no answer after {timeout:.1f} s")


def _own_card(rank: int, world_size: int) -> tuple[bytes, GckError | None]:
    """This rank's card, and why it has no library."""
    version, unique_id, error = 0, b"", None
    try:
        version = load().nccl_open(wheels())[0]
        if rank == 0:
            unique_id = load().nccl_unique_id(wheels())
    except GckError as raised:
        error = raised
    return CARD.pack(MAGIC, error is None, version, world_size, unique_id), error


def _read(cards: Sequence[bytes], own_error: GckError | None) -> bytes:
    """The unique id, if all ranks have what they need and mean the same."""
    if own_error is not None:
        raise own_error
    rows = [CARD.unpack(card) for card in cards]
    _, _, version, world_size, unique_id = rows[0]
    for rank, (magic, has_library, their_version, their_size, _) in enumerate(rows):
        if magic != MAGIC:
            raise CollectiveMismatchError(f"NcclCommunicator: rank {rank} calls something else")
        if not has_library:
            raise BackendUnavailableError(f"NcclCommunicator: rank {rank} cannot use NCCL; it says why")
        if their_size != world_size:
            raise CollectiveMismatchError(
                f"NcclCommunicator: rank {rank} is one of {their_size} ranks, rank 0 one of {world_size}"
            )
        if their_version != version:
            raise CollectiveMismatchError(
                f"NcclCommunicator: rank {rank} has NCCL {_version_text(their_version)}, "
                f"rank 0 has {_version_text(version)}"
            )
    if len(rows) != world_size:
        raise CollectiveMismatchError(f"NcclCommunicator: {len(rows)} ranks met, each expects {world_size}")
    return bytes(unique_id)


def _version_text(code: int) -> str:
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"
