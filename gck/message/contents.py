"""What can be told wrong about the fields of a body by looking at them; all tensors are on the CPU.

Temporary memory is bounded by the size of the fields, or by a few MiB where they are unpacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gck.errors import CorruptPayloadError
from gck.wire import Layout

__all__ = [
    "check_ascending",
    "check_ascending_rows",
    "check_padding",
    "check_rows",
    "check_scales",
    "check_tail",
    "with_clear_padding",
]

BLOCK = 1 << 17  # entries that are unpacked at a time


def check_padding(body: Tensor, layout: Layout) -> None:
    """Between fields, and behind the last one, there are zeros."""
    for start, end in _paddings(layout):
        if body[start:end].any():
            raise CorruptPayloadError(f"body: padding in bytes [{start}, {end}) must be 0")


def with_clear_padding(body: Tensor, layout: Layout) -> Tensor:
    """body, or where its padding is not zero a copy with zeros there.

    The fields of a payload made by hand may lie in a buffer that has other things between them.
    """
    dirty = [(start, end) for start, end in _paddings(layout) if body[start:end].any()]
    if dirty:
        body = body.clone()
    for start, end in dirty:
        body[start:end] = 0
    return body


def _paddings(layout: Layout) -> list[tuple[int, int]]:
    ends = [*(field.offset for field in layout.fields[1:]), layout.nbytes]
    return [(field.end, end) for field, end in zip(layout.fields, ends, strict=True) if field.end < end]


def check_tail(name: str, field: Tensor, bits: int) -> None:
    """From bit number `bits` on, the field holds zeros."""
    data = field.reshape(-1).view(torch.uint8)
    whole, partial = divmod(bits, 8)
    tail = data[whole + bool(partial) :]
    if tail.any() or (partial and int(data[whole]) >> partial):
        raise CorruptPayloadError(f"{name}: bits from {bits} on must be 0")


def check_rows(name: str, rows: Tensor, bits: int, last_bits: int) -> None:
    """`check_tail` of every row, in which `bits` are used, and of the last one, in which `last_bits` are."""
    data = rows.view(torch.uint8).view(rows.shape[0], -1)
    partial = bits % 8
    if partial and (data[:, -1] >> partial).any():
        row = int((data[:, -1] >> partial).ne(0).nonzero()[0])
        raise CorruptPayloadError(f"{name} of chunk {row}: bits from {bits} on must be 0")
    if last_bits < bits:
        check_tail(f"{name} of chunk {rows.shape[0] - 1}", data[-1], last_bits)


def check_scales(scales: Tensor) -> None:
    """Scales are magnitudes: 0, positive, infinite or NaN, and never with the sign bit.

    What is not finite must pass: an overflow has to reach receivers, whose loss scalers look for it.
    """
    bits = scales.reshape(-1).view(torch.int32)
    if bits.numel() and int(bits.min()) < 0:
        place = int(bits.argmin())
        raise CorruptPayloadError(
            f"scales: the sign bit must be 0, got {float(scales.reshape(-1)[place])} at position {place}"
        )


def check_ascending(indices: Tensor, limit: int) -> None:
    """(k,) integers ascend strictly within [0, limit)."""
    if not indices.numel():
        return
    before = None
    good = int(indices[0]) >= 0 and int(indices[-1]) < limit and bool((indices[1:] > indices[:-1]).all())
    if good:
        return
    for start in range(0, indices.numel(), BLOCK):
        for position, index in enumerate(indices[start : start + BLOCK].tolist(), start):
            if not 0 <= index < limit or (before is not None and index <= before):
                raise CorruptPayloadError(
                    f"indices must ascend within [0, {limit}), got {index} at position {position}"
                )
            before = index


def check_ascending_rows(rows: Tensor, k: int, bits: int, limit: int, last_limit: int) -> None:
    """The first k integers of every row, packed in `bits` bits each, ascend strictly within [0, limit).

    Of the last row: the first min(k, last_limit), within [0, last_limit).
    """
    count = rows.shape[0]
    step = max(1, BLOCK // k)
    for start in range(0, count, step):
        block = _unpacked(rows[start : start + step], bits)[:, :k]
        full = block[: count - 1 - start]
        ascends = (full[:, 1:] > full[:, :-1]).all(1) & (full[:, -1] < limit)
        if not ascends.all():
            bad = int(ascends.logical_not().nonzero()[0])
            _refuse(full[bad], start + bad, limit)
        if start + step >= count:
            last = block[-1, :last_limit]
            if int(last[-1]) >= last_limit or not (last[1:] > last[:-1]).all():
                _refuse(last, count - 1, last_limit)


def _unpacked(rows: Tensor, bits: int) -> Tensor:
    """int32 of packed rows: at least as many columns as there are whole integers in a row."""
    if bits == 16:
        return rows.view(torch.int16).to(torch.int32) & 0xFFFF
    three = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 3)).view(rows.shape[0], -1, 3).to(torch.int32)
    low = three[..., 0] | (three[..., 1] & 0xF) << 8
    high = three[..., 1] >> 4 | three[..., 2] << 4
    return torch.stack([low, high], 2).view(rows.shape[0], -1)


def _refuse(row: Tensor, chunk: int, limit: int) -> None:
    try:
        check_ascending(row, limit)
    except CorruptPayloadError as error:
        raise CorruptPayloadError(f"chunk {chunk}: {error}") from None
