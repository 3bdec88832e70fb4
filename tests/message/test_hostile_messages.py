"""No bytes crash `from_bytes`, or make it allocate what is not there; what it accepts can be used."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gck
from gck.errors import CorruptPayloadError
from tests.golden.cases import CASES, HERE
from tests.message import hostile
from tests.message.hostile import sealed

MESSAGES = {path.stem: path.read_bytes() for path in sorted((HERE / "v1").glob("*.bin"))}
# (offset, struct) of the header's fields
FIELDS = [(4, "B"), (5, "B"), (6, "B"), (7, "B"), (8, "B"), (9, "B"), (10, "<H"), (12, "<I")]
FIELDS += [(16, "<Q"), (24, "<Q"), (32, "<Q"), (40, "<Q"), (48, "<Q"), (56, "<Q")]
EXTREMES = [
    0,
    1,
    2,
    3,
    4,
    7,
    15,
    16,
    31,
    32,
    33,
    255,
    256,
    4096,
    8192,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
]
EXTREMES += [2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1]


def change_field(draw: st.DrawFn, data: bytearray) -> None:
    at, form = draw(st.sampled_from(FIELDS))
    near = struct.unpack_from(form, data, at)[0] + draw(st.integers(-2, 2))
    value = draw(st.one_of(st.sampled_from(EXTREMES), st.just(near), st.integers(0, 2**64 - 1)))
    struct.pack_into(form, data, at, value % (1 << 8 * struct.calcsize(form)))


def change_bytes(draw: st.DrawFn, data: bytearray) -> None:
    at = draw(st.integers(0, len(data) - 1))
    new = draw(st.binary(min_size=1, max_size=9))
    data[at : at + len(new)] = new[: len(data) - at]


def splice(draw: st.DrawFn, data: bytearray) -> None:
    """The body, or a part of it, of another message."""
    other = MESSAGES[draw(st.sampled_from(sorted(MESSAGES)))]
    data[draw(st.sampled_from([64, 40, len(data) // 2])) :] = other[draw(st.sampled_from([64, 40, 80])) :]


def resize(draw: st.DrawFn, data: bytearray) -> None:
    end = draw(st.integers(0, len(data) + 40))
    data[end:] = bytes(max(0, end - len(data)))
    if draw(st.booleans()) and len(data) >= 64:
        struct.pack_into("<Q", data, 40, len(data) - 64)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(MESSAGES[draw(st.sampled_from(sorted(MESSAGES)))])
    for change in draw(st.lists(st.sampled_from([change_field, change_bytes, splice, resize]), max_size=3)):
        if len(data) >= 64:
            change(draw, data)
    return sealed(data) if draw(st.booleans()) else bytes(data)


@st.composite
def with_a_header(draw: st.DrawFn) -> bytes:
    """A header that may well be right, and any body of the size that it says."""
    each = draw(st.sampled_from(sorted(MESSAGES)))
    data = bytearray(MESSAGES[each][:64])
    body = draw(st.binary(max_size=200))
    body = body[: len(body) // 16 * 16]
    struct.pack_into("<Q", data, 16, draw(st.integers(0, 400)))
    struct.pack_into("<Q", data, 40, len(body))
    if draw(st.booleans()):
        struct.pack_into("<Q", data, 24, draw(st.integers(0, 40)))
    return sealed(data + body)


@settings(max_examples=300, deadline=None)
@given(st.one_of(mutated(), mutated(), with_a_header(), st.binary(max_size=300)))
def test_any_bytes(data: bytes) -> None:
    hostile.check(data)
    hostile.parse(data, None)


@pytest.mark.parametrize("name", CASES)
def test_the_check_can_pass(name: str) -> None:
    """Else the test above would be of refusals alone."""
    assert hostile.check(MESSAGES[name]) == (CASES[name][0]().numel <= hostile.MAX_NUMEL)
    assert hostile.parse(MESSAGES[name], None) is not None


def test_mutations_are_accepted_and_refused() -> None:
    """Any bytes are values: many of the strings that the strategies make must come through."""
    accepted = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(mutated())
    def run(data: bytes) -> None:
        accepted.append(hostile.check(data))

    run()
    assert 20 < sum(accepted) < len(accepted) - 20


def test_all_values_of_small_header_fields() -> None:
    for name in ("topk_fp32", "chunk_topk_2_bits", "quantize_mean", "coded_elias_fano_4_bits"):
        for at in range(4, 12):
            for value in range(256):
                data = bytearray(MESSAGES[name])
                data[at] = value
                with contextlib.suppress(CorruptPayloadError):
                    gck.from_bytes(sealed(data))


def test_python_allocates_in_proportion_too() -> None:
    generator = random.Random(1)
    tracemalloc.start()
    try:
        for _ in range(200):
            data = bytearray(MESSAGES[generator.choice(sorted(MESSAGES))])
            at, form = generator.choice(FIELDS[5:])
            struct.pack_into(form, data, at, generator.choice(EXTREMES) % (1 << 8 * struct.calcsize(form)))
            sent = sealed(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(CorruptPayloadError):
                gck.from_bytes(sent)
            assert tracemalloc.get_traced_memory()[1] - before < 1 << 18
    finally:
        tracemalloc.stop()


def test_a_large_message_takes_memory_in_proportion() -> None:
    """Where fields are unpacked, and where a million indices have one that is wrong at the very end."""
    n = 1 << 20
    x = torch.randn(n, generator=torch.Generator().manual_seed(3))
    chunks = gck.ChunkTopK(index_bits=12)
    body = torch.zeros(1, chunks.layout(n).nbytes, dtype=torch.uint8)
    chunks.compress_(x, None, body)
    rows = [view.view(chunks.chunks(n), -1) for view in chunks.layout(n).views(body[0])]
    payload = gck.ChunkSparse(*rows, n, 4096, 64, 16)
    for each in (payload, gck.topk(x, ratio=0.25)):
        data = bytearray(gck.to_bytes(each))
        assert hostile.parse(bytes(data), None) is not None
        data[-4:] = b"\xff\xff\xff\x7f"
        assert hostile.parse(sealed(data), None) is None
