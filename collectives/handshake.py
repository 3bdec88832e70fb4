"""Ranks compare what they are about to do before they send a payload.

Without it, ranks that disagree make gloo abort a healthy process from C++ and NCCL hang. Each rank
gathers everybody's 64-byte header, so all of them see the same differences and raise the same error,
and nothing else is in flight: the group stays usable.

The header, little-endian:

    4  magic "GCKH"       1  version       1  algorithm     1  dtype      1  reduction
    4  world size         4  tensors       8  sequence      8  numel, all tensors together
    12 blake2b of the compressor's configuration   12 blake2b of every numel (and dtype, if mixed; and name)
    8  seal: blake2b of the 56 bytes before it

A header whose seal is wrong was damaged on its way, and says nothing of the rank that sent it. With
checksums ranks tell one another of it, as of any damaged message; without, only its receiver knows.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch

from gck.collectives.transports import Transport
from gck.collectives.transports.checked import DAMAGED, agree_on_fault
from gck.compressor import describe
from gck.errors import ArgumentError, CollectiveMismatchError, CorruptPayloadError

__all__ = ["VALIDATE", "Signature", "agree", "check_validate", "describe"]

VALIDATE = ("first", "always", "off")
HEADER = struct.Struct("<4sBBBBIIQQ12s12s8s")
MAGIC = b"GCKH"
VERSION = 8  # no flipped bit makes another one of it that was in use: 1, 2, 4, 7
PLACE = 0x484B4347  # of its verdicts; not the sequence, which may be what ranks differ in
SEAL = 8  # bytes, the last ones in every version but the first, which had none
ALGORITHMS = ("gather", "one_phase", "two_phase", "dense", "mixed", "seeded", "factored")
REDUCTIONS = ("none", "avg", "sum")
DTYPES = ("mixed", "float32", "bfloat16", "float16")
# A compressor whose seed is part of the signature makes a new one at every step. All ranks agree on the same
# signatures in the same order, so that all of them forget at the same call.
MOST_AGREED = 4096
MOST_SHOWN = 4  # tensors in the text of an error


class _Header(NamedTuple):
    """The fields, by the names that errors use."""

    magic: bytes
    version: int
    algorithm: int
    dtype: int
    reduction: int
    world_size: int
    tensors: int
    sequence: int
    numel: int
    compressor: bytes
    shapes: bytes
    seal: bytes


@dataclass(frozen=True)
class Signature:
    """What one call is about to do; ranks must agree on all of it.

    Attributes:
        algorithm: "gather", "one_phase", "two_phase", "seeded", "factored", "dense", or "mixed" where tensors
            go by different ones.
        compressor: the configuration as text, see `describe`.
        dtypes, numels: of each tensor.
        reduction: "avg", "sum" or "none".
        names: of each tensor, where they have some: equal sizes do not make them the same.
        columns: of each tensor, where the compressor takes it for a matrix.
    """

    algorithm: str
    compressor: str
    dtypes: tuple[torch.dtype, ...]
    numels: tuple[int, ...]
    reduction: str = "none"
    names: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()

    def __str__(self) -> str:
        tensors = ", ".join(f"{count} {dtype}" for dtype, count in Counter(map(str, self.dtypes)).items())
        sizes = ", ".join(map(str, self.numels[:MOST_SHOWN])) + (
            ", ..." if len(self.numels) > MOST_SHOWN else ""
        )
        names = f" ({', '.join(self.names[:MOST_SHOWN])}{', ...' if len(self.names) > MOST_SHOWN else ''})"
        rows = ", ".join(map(str, self.columns[:MOST_SHOWN])) + (
            "..." if len(self.columns) > MOST_SHOWN else ""
        )
        what = f"{tensors} with {sizes} elements{names if self.names else ''}"
        what += f" in rows of {rows}" if self.columns else ""
        return f"{self.algorithm} {self.reduction} of {what} by {self.compressor}"

    def header(self, world_size: int, sequence: int) -> bytes:
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        dtype = names[0] if len(set(names)) == 1 and names[0] in DTYPES else "mixed"
        packed = HEADER.pack(
            MAGIC,
            VERSION,
            ALGORITHMS.index(self.algorithm),
            DTYPES.index(dtype),
            REDUCTIONS.index(self.reduction),
            world_size,
            len(self.numels),
            sequence,
            sum(self.numels),
            _digest(self.compressor),
            # Names are here only where the dtype field cannot say them.
            _digest(repr((self.numels, names if dtype == "mixed" else None, *self.names, *self.columns))),
            bytes(SEAL),
        )
        return packed[:-SEAL] + _seal(packed)


def check_validate(function: str, validate: object) -> None:
    """Raises ArgumentError unless `validate` is one of `VALIDATE`."""
    if validate not in VALIDATE:
        raise ArgumentError(f'{function}: validate must be "first", "always" or "off", got {validate!r}')


def agree(
    transport: Transport, function: str, signature: Signature, validate: str = "first", checksum: bool = False
) -> None:
    """Returns on every rank when all call the same, raises on every rank when not.

    "first" finds configurations that differ when a job, or a new phase of it, starts. It cannot find a rank
    that later takes another turn among calls that the group has agreed on before, since those exchange no
    header: that ends in a timeout, and with messages of unequal size gloo may end the process. "always"
    finds these too, for one small message more a call.

    Args:
        transport: the group.
        function: name of the public function, for the error's text.
        signature: what this rank is about to do.
        validate: "first" exchanges headers when this rank meets a signature for the first time, "always"
            on every call, "off" never; must itself be the same on all ranks.
        checksum: whether ranks tell one another of damaged headers: 16 bytes more from each. The signature's
            compressor must say so, too.

    Raises:
        ArgumentError: validate is none of these.
        CollectiveMismatchError: ranks differ; the group stays usable.
        CorruptPayloadError: a header was damaged. With checksums on all ranks, and the group stays usable;
            without, on the rank that got it alone, which gives the group up, since the others go on.
    """
    check_validate(function, validate)
    calls = transport.calls
    calls.sequence += 1
    key = signature.header(transport.world_size, 0)
    if transport.world_size == 1 or validate == "off" or (validate == "first" and key in calls.agreed):
        return
    own = signature.header(transport.world_size, calls.sequence)
    send = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    headers = [bytes(row.tolist()) for row in transport.all_gather_bytes(send)]
    damaged = [rank for rank, header in enumerate(headers) if not _sound(header)]
    if checksum and _all_checked(headers, damaged, own):
        fault = (DAMAGED, damaged[0]) if damaged else None
        agree_on_fault(transport, f"{function}: handshake", fault, PLACE)
    elif damaged:
        text = f"handshake: the message from rank {damaged[0]} to rank {transport.rank} was damaged"
        transport.abort(text)
        raise CorruptPayloadError(
            f"{function}: {text}; other ranks may have gone on, so that the group was given up"
        )
    if len(set(headers)) == 1:
        if len(calls.agreed) >= MOST_AGREED:
            calls.agreed.clear()
        calls.agreed.add(key)
        return
    # Ranks that lost count of each other must not differ for ever.
    calls.sequence = max(_Header._make(HEADER.unpack(header)).sequence for header in headers)
    raise CollectiveMismatchError(f"{function}: {_differences(headers)}; this rank has {signature}")


def _sound(header: bytes) -> bool:
    return header[-SEAL:] == _seal(header) or header[:5] == MAGIC + b"\1"


def _all_checked(headers: Sequence[bytes], damaged: Sequence[int], own: bytes) -> bool:
    """Whether every rank will say what it got: those that have checksums, too, which the compressor tells."""
    compressor = _Header._make(HEADER.unpack(own)).compressor
    sound = [header for rank, header in enumerate(headers) if rank not in damaged]
    return all(_Header._make(HEADER.unpack(header)).compressor == compressor for header in sound)


def _differences(headers: Sequence[bytes]) -> str:
    """Which ranks differ from what most ranks sent, and in which fields."""
    most = Counter(headers).most_common(1)[0][0]
    common = _Header._make(HEADER.unpack(most))
    others = "most ranks" if len(headers) > 2 else f"rank {headers.index(most)}"
    texts = []
    for rank, packed in enumerate(headers):
        header = _Header._make(HEADER.unpack(packed))
        fields = [
            _difference(name, mine, theirs)
            for name, mine, theirs in zip(_Header._fields, header, common, strict=True)
            if mine != theirs and name != "seal"
        ]
        if fields:
            texts.append(f"rank {rank} differs from {others} in {', '.join(fields)}")
    return "; ".join(texts)


def _difference(name: str, mine: object, theirs: object) -> str:
    if isinstance(mine, bytes) or isinstance(theirs, bytes):
        # The text of a compressor names checksums and pieces, too.
        return {"compressor": "compressor or an option", "shapes": "shapes or names"}.get(name, name)
    names = {"algorithm": ALGORITHMS, "dtype": DTYPES, "reduction": REDUCTIONS}.get(name)
    if names is not None and isinstance(mine, int) and isinstance(theirs, int):
        return f"{name} ({_name(names, mine)}, not {_name(names, theirs)})"
    return f"{name} ({mine}, not {theirs})"


def _name(names: Sequence[str], code: int) -> str:
    return names[code] if code < len(names) else f"unknown code {code}"


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=12).digest()


def _seal(header: bytes) -> bytes:
    return blake2b(header[:-SEAL], digest_size=SEAL).digest()
