"""A transport whose messages carry checksums, so that damaged ones are found, and by all ranks.

Every message ends in 16 bytes, little-endian:

    8  xxh3_64 of the message, seeded by its receiver
    4  sequence of the collective      2  operation in it      2  sender

After an operation ranks tell one another in 16 bytes each whether all was well, so that either all of them
go on or all raise the same error, with the group in step.

    8  xxh3_64 of the rest   1  what was wrong, 0: nothing   1  zero   2  with whose message   4  place

A message of the right content in the wrong place, such as one that is repeated, differs in its sequence or
operation. Checksums are taken on the host: messages from a device are copied there, which waits for it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gck.collectives.transports import CallLog, Transport
from gck.errors import BackendUnavailableError, CorruptPayloadError, GroupUnusableError
from gck.wire import memory_of

__all__ = ["DAMAGED", "Checked", "agree_on_fault"]

TRAILER = struct.Struct("<QIHH")
VERDICT = struct.Struct("<QBxHI")
NBYTES = 16
WELL, DAMAGED, MISPLACED = range(3)
WORDS = {DAMAGED: "was damaged: its checksum differs", MISPLACED: "belongs to another operation"}


class Checked:
    """Implements `Transport` over another one; made for a single collective."""

    def __init__(self, inner: Transport, sequence: int = 0) -> None:
        """
        Args:
            sequence: of the collective, the same on all ranks and another for every one.

        Raises:
            BackendUnavailableError: xxhash is not installed.
        """
        try:
            from xxhash import xxh3_64_intdigest
        except ImportError as error:
            raise BackendUnavailableError(
                f"checksums need xxhash, which cannot be imported ({error}): `pip install xxhash`"
            ) from error
        self._hash = xxh3_64_intdigest
        self._inner, self._sequence = inner, sequence & 0xFFFFFFFF
        self._operation = 0

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    @property
    def timeout(self) -> float:
        return self._inner.timeout

    @property
    def calls(self) -> CallLog:
        return self._inner.calls

    def with_timeout(self, seconds: float) -> Checked:
        return Checked(self._inner.with_timeout(seconds), self._sequence)

    def all_gather_bytes(self, send: Tensor) -> Tensor:
        """As of any transport; raises CorruptPayloadError on all ranks where one got damaged bytes."""
        return self._checked(
            "all_gather", self._inner.all_gather_bytes(self._sealed(send.unsqueeze(0))[0]), 0
        )

    def all_to_all_bytes(self, send: Tensor) -> Tensor:
        """As of any transport; raises CorruptPayloadError on all ranks where one got damaged bytes."""
        return self._checked("all_to_all", self._inner.all_to_all_bytes(self._sealed(send, 1)), self.rank + 1)

    def all_reduce(self, tensor: Tensor) -> None:
        """As of any transport; what the backend sends cannot be sealed, so ranks compare their results.

        Damage before the sum reaches all ranks alike, and is not found.
        """
        self._inner.all_reduce(tensor)
        self._inner.synchronize()
        host = _on_host(tensor)
        digest = self._hash(memory_of(host))
        send = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.uint8)
        digests = {bytes(row.tolist()) for row in self.all_gather_bytes(send)}
        if len(digests) > 1:
            raise _damaged("all_reduce: a message was damaged: ranks have different sums")

    def barrier(self) -> None:
        self._inner.barrier()

    def synchronize(self) -> None:
        self._inner.synchronize()

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def _sealed(self, rows: Tensor, first: int = 0) -> Tensor:
        """Each row with its trailer; `first` is the receiver's seed of row 0, see `_trailer`."""
        self._operation += 1
        sealed = torch.empty(rows.shape[0], rows.shape[1] + NBYTES, dtype=torch.uint8, device=rows.device)
        sealed[:, :-NBYTES] = rows
        trailers = bytearray()
        for receiver, row in enumerate(rows, first):
            trailers += self._trailer(_on_host(row), self.rank, receiver)
        sealed[:, -NBYTES:] = torch.frombuffer(trailers, dtype=torch.uint8).view(-1, NBYTES)
        return sealed

    def _trailer(self, message: Tensor, sender: int, receiver: int) -> bytes:
        """receiver: the seed of the checksum: 1 + its rank, or 0 where all ranks get the same."""
        place = self._sequence, self._operation & 0xFFFF, sender & 0xFFFF
        return TRAILER.pack(self._hash(memory_of(message), receiver), *place)

    def _checked(self, operation: str, received: Tensor, receiver: int) -> Tensor:
        """The rows of `received` without their trailers, once every rank has found its own well."""
        self._inner.synchronize()
        faults = (self._fault(row, sender, receiver) for sender, row in enumerate(received))
        fault = next(filter(None, faults), None)
        place = (self._sequence << 8 ^ self._operation) & 0xFFFFFFFF
        agree_on_fault(self._inner, operation, fault, place)
        return received[:, :-NBYTES]

    def _fault(self, row: Tensor, sender: int, receiver: int) -> tuple[int, int] | None:
        """(what is wrong, with whose message), if anything."""
        host = _on_host(row)
        trailer, expected = bytes(host[-NBYTES:].tolist()), self._trailer(host[:-NBYTES], sender, receiver)
        if trailer == expected:
            return None
        return (DAMAGED if trailer[:8] != expected[:8] else MISPLACED), sender


def agree_on_fault(transport: Transport, operation: str, fault: tuple[int, int] | None, place: int) -> None:
    """Tells all ranks what was wrong with what this one got; returns on all of them, or raises on all.

    Args:
        operation: its name, for the error's text.
        fault: what was wrong, a key of `WORDS`, and with whose message.
        place: in the program, below 2^32; the same on all ranks.

    Raises:
        CorruptPayloadError: a rank got something that was wrong; on all ranks.
        GroupUnusableError: what a rank told was damaged; the group was given up.
    """
    from xxhash import xxh3_64_intdigest  # `Checked` has said so where it is missing

    what, whose = fault or (WELL, 0)
    verdict = struct.pack("<BxHI", what, whose & 0xFFFF, place)
    own = struct.pack("<Q", xxh3_64_intdigest(verdict)) + verdict
    rows = transport.all_gather_bytes(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    for rank, row in enumerate(rows):
        digest, what, whose, theirs = VERDICT.unpack(packed := bytes(row.tolist()))
        if digest != xxh3_64_intdigest(packed[8:]) or theirs != place:
            # Others may have understood it, and gone on: nobody knows who has what.
            transport.abort(f"{operation}: what rank {rank} says of its messages was damaged")
            raise GroupUnusableError(
                f"{operation}: what rank {rank} says of its messages was damaged; ranks may have gone on "
                "without this one"
            )
        if what != WELL:
            words = WORDS.get(what, f"is wrong ({what})")
            raise _damaged(f"{operation}: the message from rank {whose} to rank {rank} {words}")


def _on_host(tensor: Tensor) -> Tensor:
    """Its bytes: (nbytes,) uint8, without a copy where it is on the host already."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _damaged(text: str) -> CorruptPayloadError:
    error = CorruptPayloadError(text)
    error.on_all_ranks = True
    return error
