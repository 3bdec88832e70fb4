"""Payloads as messages: a header of 64 bytes, and the body as `gck.wire` lays it out.

A message says what it is, so that whoever gets it needs no other agreement: for files, sockets and queues.
(Collectives send bodies alone: their ranks agree on the rest in a handshake.) The format, byte by byte, and
what a receiver checks: docs/wire-format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gck.errors import (
    ArgumentError,
    BackendUnavailableError,
    CorruptPayloadError,
    DtypeError,
    LayoutError,
)
from gck.message.contents import check_padding, with_clear_padding
from gck.message.formats import OPTIONS, Format, checked, format_of
from gck.message.header import CHECKSUM, HEADER_NBYTES, MOST_NUMEL, VERSION, Header, parse
from gck.payload import Payload
from gck.values import check_flags, plain_int, shown
from gck.wire import Layout, body_of, has_memory, memory_of

__all__ = ["HEADER_NBYTES", "VERSION", "Header", "from_bytes", "read_header", "to_buffers", "to_bytes"]

Bytes: TypeAlias = bytes | bytearray | memoryview | Tensor


def to_bytes(payload: Payload, *, checksum: bool = True) -> bytes:
    """The message that says `payload`, for `from_bytes` to read.

    A payload on a GPU is copied to the host, which waits for the work that makes it. What is written is
    checked as a receiver would, so that every message can be read.

    Args:
        payload: any payload of gck, its tensors contiguous.
        checksum: whether to add an xxh3_64 of the whole message (needs the package xxhash): against bits
            that change on their way. It is no signature: whoever changes bytes on purpose changes it, too.

    Raises:
        DtypeError: payload is no payload of gck, or a field of it is of another type than is documented, or
            checksum no bool.
        CorruptPayloadError: the payload contradicts itself.
        BackendUnavailableError: checksum is asked for and xxhash is not installed.
    """
    header, body = _buffers("to_bytes", payload, checksum)
    return b"".join((header, memory_of(body)))


def to_buffers(payload: Payload, *, checksum: bool = True) -> tuple[bytes, Tensor]:
    """`to_bytes` in two parts, the header and the (nbytes,) uint8 body, to send one after the other.

    The body of a payload that gck made on the CPU is that payload's own memory: nothing is copied.
    """
    return _buffers("to_buffers", payload, checksum)


def from_bytes(
    data: Bytes, *, device: torch.device | str | None = None, max_numel: int | None = None
) -> Payload:
    """The payload that a message says.

    Nothing in `data` is trusted. All of it is checked, and before anything is allocated its header must
    account for the number of bytes that are there: memory is a copy of the body, temporary memory of at
    most its size, and a few MiB. Values and scales need not be finite: that is how an overflow
    reaches a receiver.

    To decompress is another matter: 4 bytes times payload.numel, and a message of a few bytes can say
    numel = 2**62. **Whoever gets messages from others sets max_numel**, or looks at payload.numel.

    Args:
        data: exactly one message: bytes, bytearray, memoryview, or a contiguous uint8 tensor. Copied.
        device: of the payload's tensors. Default: the CPU.
        max_numel: the largest number of elements of a dense vector that is accepted. Default: any.

    Returns:
        A payload whose tensors are views of one buffer. `to_bytes` of it, with a checksum if `data` has
        one, is `data`.

    Raises:
        CorruptPayloadError: the bytes are no message, more or fewer than one, changed on their way, or
            contradict themselves; or numel is above max_numel. The text says what is wrong, and where.
        PayloadVersionError: a CorruptPayloadError: the message is of a version that this gck cannot read.
        BackendUnavailableError: the message has a checksum, and xxhash is not installed.
        DtypeError, LayoutError, ArgumentError: data, device or max_numel are of the wrong kind, or torch has
            no such device here.
    """
    function = "from_bytes"
    if device is not None:
        device = _usable(function, device)
    with _viewed(function, data) as view:
        header, format_, layout = _read_header(function, view, max_numel)
        if len(view) != header.nbytes:
            raise CorruptPayloadError(
                f"{function}: the header is of a message of {header.nbytes} bytes, got {len(view)}"
            )
        # A copy, so that nobody can change what has been checked, and fields are aligned.
        body = torch.empty(header.body_nbytes, dtype=torch.uint8)
        memory_of(body)[:] = view[HEADER_NBYTES:]
    if header.flags & CHECKSUM:
        found = _checksum(function, header, body)
        if found != header.checksum:
            raise CorruptPayloadError(
                f"{function}: the checksum of these {header.nbytes} bytes is {found:#018x}, "
                f"the header says {header.checksum:#018x}"
            )
    fields = _checked_fields(function, header, format_, layout, body)
    if device is not None:
        fields = _fields(format_, layout, header, body.to(device))
    return format_.payload(header, fields)


def _usable(function: str, device: torch.device | str) -> torch.device:
    """The device, if torch can use it here; its own errors are of any type."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ArgumentError(
            f"{function}: device must be one that torch can use here, got {device!r} ({error})"
        ) from error


def read_header(data: Bytes, *, max_numel: int | None = None) -> Header:
    """The header at the start of `data`, checked as far as it can be without the body.

    For a receiver of a stream: `read_header(first_64_bytes, max_numel=...).nbytes` says how long the
    message is. Bound it before reading on: it is in proportion to what a peer says.

    Args and errors as for `from_bytes`; `data` may end anywhere behind the header.
    """
    with _viewed("read_header", data) as view:
        return _read_header("read_header", view, max_numel)[0]


def _read_header(function: str, view: memoryview, max_numel: int | None) -> tuple[Header, Format, Layout]:
    max_numel = plain_int(max_numel)
    if max_numel is not None and (isinstance(max_numel, bool) or not isinstance(max_numel, int)):
        raise DtypeError(f"{function}: max_numel must be an int or None, got {shown(max_numel)}")
    if max_numel is not None and max_numel < 0:
        raise ArgumentError(f"{function}: max_numel must be at least 0, got {max_numel}")
    header = parse(function, view)
    if max_numel is not None and header.numel > max_numel:
        raise CorruptPayloadError(
            f"{function}: header: numel must be at most max_numel={max_numel}, got {header.numel}"
        )
    return header, *checked(function, header)


def _buffers(function: str, payload: Payload, checksum: bool) -> tuple[bytes, Tensor]:
    check_flags(function, checksum=checksum)
    format_ = format_of(payload)
    if format_ is None:
        raise DtypeError(f"{function}: payload must be a payload of gck, got {shown(payload)}")
    _check_types(function, payload)
    with _naming(function):
        options = dict.fromkeys(OPTIONS, 0) | format_.options(payload)
    for name, value in {"numel": payload.numel, **options}.items():
        if type(value) is not int:  # a tensor, or a number that is no plain one
            raise DtypeError(f"{function}: payload.{name} must be an int, got {shown(value)}")
    if checksum:
        options["flags"] |= CHECKSUM
    header = Header(compressor=format_.id, numel=payload.numel, body_nbytes=payload.nbytes, **options)
    if not 0 <= payload.numel <= MOST_NUMEL:
        raise CorruptPayloadError(f"{function}: payload.numel must be in [0, 2**63), got {payload.numel}")
    _, layout = checked(function, header)
    wanted = format_.shapes(header)
    found = tuple((field.dtype, tuple(field.shape)) for field in payload.fields)
    if found != wanted:
        kind = format_.kind.__name__
        raise CorruptPayloadError(f"{function}: fields of this {kind} must be {wanted}, got {found}")
    with torch.no_grad():
        body = with_clear_padding(body_of(*payload.fields).cpu(), layout)
    _checked_fields(function, header, format_, layout, body)
    if checksum:
        header = header._replace(checksum=_checksum(function, header, body))
    return header.pack(), body


def _check_types(function: str, payload: Payload) -> None:
    for name, value in payload._asdict().items():
        if isinstance(value, Tensor):
            _check_memory(function, f"payload.{name}", value)
        elif name in ("scale", "index_codec"):
            if not isinstance(value, str):
                raise DtypeError(f"{function}: payload.{name} must be a str, got {shown(value)}")
        elif isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{function}: payload.{name} must be a tensor or an int, got {shown(value)}")
    for field in payload.fields:
        if not isinstance(field, Tensor):
            raise DtypeError(f"{function}: fields of a payload must be tensors, got {shown(field)}")


def _check_memory(function: str, name: str, value: Tensor) -> None:
    if value.is_nested or value.layout is not torch.strided or not value.is_contiguous():
        raise LayoutError(f"{function}: {name} must be contiguous, got {shown(value)}")
    if not has_memory(value):
        raise LayoutError(f"{function}: {name} has no memory that can be read, got {shown(value)}")


def _checked_fields(
    function: str, header: Header, format_: Format, layout: Layout, body: Tensor
) -> tuple[Tensor, ...]:
    with _naming(function):
        fields = _fields(format_, layout, header, body)
        check_padding(body, layout)
        format_.check(header, fields)
    return fields


def _fields(format_: Format, layout: Layout, header: Header, body: Tensor) -> tuple[Tensor, ...]:
    shapes = [shape for _, shape in format_.shapes(header)]
    return tuple(view.view(shape) for view, shape in zip(layout.views(body), shapes, strict=True))


def _checksum(function: str, header: Header, body: Tensor) -> int:
    try:
        from xxhash import xxh3_64
    except ImportError as error:
        raise BackendUnavailableError(
            f"{function}: a checksum needs xxhash, which cannot be imported ({error}): `pip install xxhash`"
            ", or do without: to_bytes(payload, checksum=False)"
        ) from error
    found = xxh3_64(header._replace(checksum=0).pack())
    found.update(memory_of(body))
    return found.intdigest()


@contextmanager
def _naming(function: str) -> Iterator[None]:
    """Texts of formats and contents say what is wrong; the error says who was called, too."""
    try:
        yield
    except (CorruptPayloadError, DtypeError) as error:
        raise type(error)(f"{function}: {error}") from None


@contextmanager
def _viewed(function: str, data: Any) -> Iterator[memoryview]:
    """The bytes of `data`, for as long as the context lasts."""
    if isinstance(data, Tensor):
        if data.is_nested or data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
            raise DtypeError(f"{function}: data must be contiguous (nbytes,) uint8, got {shown(data)}")
        _check_memory(function, "data", data)
        host = data.detach().cpu()
        yield memory_of(host)
        return
    try:
        whole = memoryview(data)
    except TypeError:
        raise DtypeError(
            f"{function}: data must be bytes, bytearray, memoryview or a uint8 tensor, got {shown(data)}"
        ) from None
    with whole:
        if not whole.c_contiguous:
            raise LayoutError(f"{function}: data must be contiguous, got strides {whole.strides}")
        with whole.cast("B") as view:
            yield view
