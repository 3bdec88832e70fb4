"""Where the fields of a payload lie in its body.

A body is one run of bytes: the payload's fields in order, each starting at a multiple of 16 bytes,
little-endian, padding zero. Its size follows from the compressor's configuration and the number of
elements alone, so ranks never have to exchange sizes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from gck._native import load
from gck.errors import CorruptPayloadError, LayoutError
from gck.memory import dlpack_type, empty
from gck.values import shown

__all__ = [
    "ALIGNMENT",
    "Field",
    "Layout",
    "body_in_place",
    "body_of",
    "has_memory",
    "layout_of",
    "memory_of",
    "payloads_of",
]

P = TypeVar("P", bound=tuple[Any, ...])

ALIGNMENT = 16
SMALL = 1 << 14  # bytes
# Tensors do not speak the buffer protocol without NumPy, which gck does not need otherwise.
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
WRITABLE = 0x200  # PyBUF_WRITE


def _align(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True)
class Field:
    """`count` elements of `dtype`, in the bytes of the body from `offset` up to `end`."""

    dtype: torch.dtype
    count: int
    offset: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The fields of one body, in order.

    Attributes:
        nbytes: size of the body: a multiple of 16 bytes.
    """

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, *fields: tuple[torch.dtype, int]) -> Layout:
        """Lays out (dtype, count) pairs one after another."""
        # Tracing may bring symbolic sizes, which have no hash, and looks through caches anyway.
        if torch.compiler.is_compiling():
            return _lay_out(fields)
        try:
            return _remembered(fields)
        except TypeError:
            return _lay_out(fields)

    def empty_body(self, device: torch.device) -> Tensor:
        """A (nbytes,) uint8 body for a kernel that writes every field: only the padding is zero."""
        nbytes = self.nbytes
        if nbytes < SMALL:  # zeroing all of it is quicker than asking where the padding is
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        body = empty(nbytes, torch.uint8, device)
        ends = [*(f.offset for f in self.fields[1:]), nbytes]
        for field, end in zip(self.fields, ends, strict=True):
            if field.end < end:
                body[field.end : end].zero_()
        return body

    def native(self, *shapes: tuple[int, ...]) -> Any:
        """The same for the compiled module. Fields are vectors, unless shapes of all of them are given."""
        fields = [
            (*dlpack_type(f.dtype), f.offset, shape)
            for f, shape in zip(self.fields, shapes or [(f.count,) for f in self.fields], strict=True)
        ]
        return load().BodyLayout(fields, self.nbytes)

    def __reduce__(self) -> tuple[type[Layout], tuple[Any, ...]]:
        """Pickles and copies hold what was laid out; they make `native`, a handle in this process, anew."""
        return Layout, (self.fields, self.nbytes)

    def views(self, body: Tensor) -> tuple[Tensor, ...]:
        """Typed views of a (nbytes,) uint8 body, one a field; nothing is copied.

        Raises:
            CorruptPayloadError: the body has another size than the layout.
        """
        if body.dtype != torch.uint8 or body.dim() != 1 or body.numel() != self.nbytes:
            raise CorruptPayloadError(
                f"payload body: expected {self.nbytes} bytes, got {tuple(body.shape)} of {body.dtype}"
            )
        # A field of nothing needs no address, and where there is nothing it may have no aligned one.
        if torch.compiler.is_compiling():  # which takes pieces of a split for copies
            return tuple(
                [
                    body[f.offset : f.end].view(f.dtype) if f.count else body.new_empty(0, dtype=f.dtype)
                    for f in self.fields
                ]
            )
        parts = body.unsafe_split_with_sizes(self._pieces)
        return tuple(
            [
                part.view(f.dtype) if f.count else body.new_empty(0, dtype=f.dtype)
                for part, f in zip(parts[::2], self.fields, strict=True)
            ]
        )

    def pack_(self, body: Tensor, fields: Sequence[Tensor]) -> None:
        """Copies fields, from any device, into a (nbytes,) uint8 body; its padding becomes zero."""
        body.zero_()
        for view, field in zip(self.views(body), fields, strict=True):
            view.copy_(field.reshape(-1))

    @cached_property
    def _pieces(self) -> list[int]:
        """Bytes of each field and of the padding behind it, in turn."""
        ends = [*(f.offset for f in self.fields[1:]), self.nbytes]
        return [
            size for f, end in zip(self.fields, ends, strict=True) for size in (f.end - f.offset, end - f.end)
        ]


def _lay_out(fields: tuple[tuple[torch.dtype, int], ...]) -> Layout:
    placed: list[Field] = []
    offset = 0
    for dtype, count in fields:
        placed.append(Field(dtype, count, offset, offset + count * dtype.itemsize))
        offset = _align(placed[-1].end)
    return Layout(tuple(placed), offset)


_remembered = lru_cache(maxsize=1024)(_lay_out)


def layout_of(*fields: Tensor) -> Layout:
    """The layout of a body that holds these tensors."""
    return Layout.of(*((f.dtype, f.numel()) for f in fields))


def body_of(*fields: Tensor) -> Tensor:
    """The (nbytes,) uint8 body that holds these tensors in order.

    Without a copy when they already are views of one body (as every payload made by gck is),
    else packed into a new buffer.
    """
    body = body_in_place(*fields)
    if body is None:
        layout = layout_of(*fields)
        for field in fields:
            if not has_memory(field):
                raise LayoutError(f"a field of a payload has no memory to be read, got {shown(field)}")
        body = torch.empty(layout.nbytes, dtype=torch.uint8, device=fields[0].device)
        layout.pack_(body, fields)
    return body


def body_in_place(*fields: Tensor) -> Tensor | None:
    """The body that these tensors are views of, as a view; None where they are not of one."""
    layout = layout_of(*fields)
    first = fields[0]
    start = first.storage_offset() * first.element_size()
    storage = first.untyped_storage()
    # By addresses: fields may have storages of their own on the memory that the first one's reaches over.
    base = storage.data_ptr() + start
    in_place = start + layout.nbytes <= storage.nbytes() and all(
        f.is_contiguous() and f.data_ptr() == base + place.offset
        for f, place in zip(fields, layout.fields, strict=True)
        if place.count  # what is empty lies nowhere
    )
    in_place = in_place and not any(f.is_neg() for f in fields)  # memory holds the opposite
    if not in_place:
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=first.device)
    return whole.set_(storage, start, (layout.nbytes,), (1,))


def payloads_of(like: P, rows: Iterable[Tensor]) -> list[P]:
    """A payload like `like` of each row, a body: its tensors are views of the row, all else is `like`'s."""
    layout = layout_of(*(value for value in like if isinstance(value, Tensor)))
    payloads = []
    for row in rows:
        views = iter(layout.views(row))
        fields = (next(views).view(value.shape) if isinstance(value, Tensor) else value for value in like)
        payloads.append(type(like)(*fields))
    return payloads


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements of a contiguous tensor can be read from its memory. Tensors on the meta device,
    fake and masked ones, zeros of forward-mode differentiation, and those whose storage was freed or made
    shorter have none."""
    storage = tensor.untyped_storage()
    # Of fake tensors, too, the storage is on the meta device: where that is asked for, a class may hide it.
    if tensor.is_meta or (type(tensor) is not Tensor and storage.device.type == "meta"):
        return False
    if not tensor.nbytes:
        return True
    end = tensor.storage_offset() * tensor.element_size() + tensor.nbytes
    return end <= storage.nbytes() and tensor.data_ptr() != 0


def memory_of(body: Tensor) -> memoryview:
    """The memory of a contiguous (n,) uint8 tensor on the CPU, which the caller keeps alive; writable."""
    if not body.numel():
        return memoryview(bytearray())
    return cast("memoryview", _memory_at(body.data_ptr(), body.numel(), WRITABLE))
