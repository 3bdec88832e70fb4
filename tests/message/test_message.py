"""Payloads to bytes and back; the bytes are those of the documentation, and of every release before."""

from __future__ import annotations

import re
import struct
import sys
from enum import IntEnum
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import gck
from gck import message
from gck.compressor import REGISTRY
from gck.errors import (
    AllocationError,
    ArgumentError,
    BackendUnavailableError,
    CorruptPayloadError,
    DtypeError,
    LayoutError,
    PayloadVersionError,
)
from gck.message.formats import FORMATS
from tests.cases import same_bytes
from tests.golden.cases import CASES, HERE, dense
from tests.golden.cases import message as message_of
from tests.message import by_hand

GOLDEN = HERE / "v1"


def equal(a: Any, b: Any) -> bool:
    """Payloads: the same kind, the same bytes in fields, the same options."""
    return type(a) is type(b) and all(
        same_bytes(x, y) if isinstance(x, Tensor) else (type(x), x) == (type(y), y)
        for x, y in zip(a, b, strict=True)
    )


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


def plain(name: str) -> bytes:
    """A message without a checksum, so that what else is wrong with it is found."""
    return gck.to_bytes(CASES[name][0](), checksum=False)


def test_every_kind_has_a_format_and_a_golden_file() -> None:
    made = {type(make()) for make, _ in CASES.values()}
    assert {each.kind for each in FORMATS.values()} == made
    assert {make().compressor for make, _ in CASES.values()} == set(REGISTRY)
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    data = (GOLDEN / f"{name}.bin").read_bytes()
    payload = CASES[name][0]()
    assert message_of(name) == data
    assert equal(gck.from_bytes(data), payload)
    assert dense(name) == (GOLDEN / f"{name}.f32").read_bytes()


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_documentation(name: str, checksum: bool) -> None:
    payload = CASES[name][0]()
    data = gck.to_bytes(payload, checksum=checksum)
    assert data == by_hand.message(payload, checksum)
    assert len(data) == 64 + payload.nbytes
    header, body = message.to_buffers(payload, checksum=checksum)
    assert header + bytes(body.tolist()) == data
    assert message.read_header(header).nbytes == len(data)


def test_the_table_of_the_documentation_is_its_example() -> None:
    text = (HERE.parents[1] / "docs/wire-format.md").read_text()
    dump = re.search(r"```\n(47 43.*?)```", text, re.DOTALL)
    assert dump is not None
    data = bytes.fromhex("".join(line[:51] for line in dump.group(1).splitlines()))
    assert gck.decompress(gck.from_bytes(data)).tolist() == [0, 2.5, 0, 0, 0, 0, -0.5]


def test_fields_that_are_views_of_anything_travel() -> None:
    """With something else where the padding would be, and from separate tensors."""
    memory = torch.full((64,), 0xA5, dtype=torch.uint8)
    values, indices = memory[:4].view(torch.float32), memory[16:20].view(torch.int32)
    values[0], indices[0] = 2.5, 6
    payload = gck.SparseGrad(values, indices, 7)
    apart = gck.SparseGrad(values.clone(), indices.clone(), 7)
    assert gck.to_bytes(payload) == gck.to_bytes(apart) == by_hand.message(apart, True)
    assert (memory[20:] == 0xA5).all()


def test_buffers_are_not_copied() -> None:
    payload = CASES["topk_fp32"][0]()
    assert message.to_buffers(payload)[1].data_ptr() == payload.values.data_ptr()


@pytest.mark.parametrize(
    "form",
    [
        bytearray,
        memoryview,
        lambda data: memoryview(b"." + data)[1:],
        lambda data: torch.tensor(list(data), dtype=torch.uint8),
    ],
    ids=["bytearray", "memoryview", "unaligned", "tensor"],
)
def test_what_can_be_read(form: Any) -> None:
    name = "topk_fp32"
    data = form(message_of(name))
    payload = gck.from_bytes(data)
    assert equal(payload, CASES[name][0]())
    if isinstance(data, bytearray):
        data[:] = bytes(len(data))  # neither locked nor shared
    assert equal(payload, CASES[name][0]())
    assert payload.values.data_ptr() % 16 == 0


@pytest.mark.parametrize("name", ["topk_fp32", "chunk_topk_2_bits", "quantize_mean", "low_rank_of_one"])
def test_every_changed_bit_is_noticed(name: str) -> None:
    data = message_of(name)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptPayloadError):
            gck.from_bytes(changed)


@pytest.mark.parametrize("name", ["topk_fp32", "topk_of_nothing", "sign_32", "low_rank_of_one"])
def test_every_length_but_one_is_refused(name: str) -> None:
    data = plain(name)
    for end in range(len(data)):
        with pytest.raises(CorruptPayloadError, match=rf"^from_bytes: .*got {end}\b"):
            gck.from_bytes(data[:end])
    with pytest.raises(CorruptPayloadError, match=f"of a message of {len(data)} bytes, got {len(data) + 1}"):
        gck.from_bytes(data + b"\0")


# (case, what is written into its message as (offset, struct, value), what the error says)
TOPK, CHUNKS = "topk_fp32", "chunk_topk_4_bits_12_bit_indices"
FACTORS = "low_rank"
CODED, BLOCKS = "coded_elias_fano_4_bits", "coded_block16_of_four_blocks"
REFUSED: dict[str, tuple[str, tuple[int, str, int], str]] = {
    "magic": (TOPK, (3, "B", 72), r"magic must be b'GCKM', got b'GCKH'"),
    "id": (TOPK, (5, "B", 8), r"compressor must be one of 1, 2, 3, 4, 5, 6, 7, got 8"),
    "no id": (TOPK, (5, "B", 0), r"compressor must be .* got 0"),
    "dtype": (TOPK, (6, "B", 0), r"dtype of a SparseGrad must be one of \(1, 2, 3\), got 0"),
    "other dtype": (TOPK, (6, "B", 2), r"body_nbytes|bits of a SparseGrad must be one of \(16,\), got 32"),
    "codec": (TOPK, (7, "B", 3), r"index_codec of a SparseGrad must be one of \(1, 2\), got 3"),
    "bits": (TOPK, (8, "B", 31), r"bits of a SparseGrad must be one of \(32,\), got 31"),
    "reserved": (TOPK, (9, "B", 1), r"reserved and must be 0, got 1 and 0"),
    "reserved at the end": (TOPK, (55, "B", 1), r"reserved and must be 0, got 0 and 72057594037927936"),
    "unknown flag": (TOPK, (10, "<H", 4), r"flags must be of 0x0003, got 0x0004"),
    "flag of another kind": (TOPK, (10, "<H", 2), r"flags of a SparseGrad must be one of \(0,\), got 2"),
    "chunk size of none": (TOPK, (12, "<I", 1), r"chunk_size of a SparseGrad must be .* got 1"),
    "numel": (TOPK, (16, "<Q", 2**63), r"numel must be below 2\*\*63, got 9223372036854775808"),
    "numel below k": (TOPK, (16, "<Q", 19), r"k of a SparseGrad must be in \[0, 19\], got 20"),
    "k": (TOPK, (24, "<Q", 21), r"body_nbytes .* must be 192, got 160"),
    "k huge": (
        TOPK,
        (24, "<Q", 2**64 - 1),
        r"k of a SparseGrad must be in \[0, 200\], got 18446744073709551615",
    ),
    "seed of none": (TOPK, (32, "<q", -1), r"seed of a SparseGrad must be one of \(0,\), got -1"),
    "body": (
        TOPK,
        (40, "<Q", 2**63),
        r"body_nbytes of a SparseGrad of 200 .* must be 160, got 9223372036854775808",
    ),
    "checksum of none": (TOPK, (56, "<Q", 5), r"checksum must be 0 where flags have none, got 0x0+5$"),
    "index": (TOPK, (64 + 80 + 19 * 4, "<i", 200), r"within \[0, 200\), got 200 at position 19"),
    "index negative": (TOPK, (64 + 80, "<i", -1), r"got -1 at position 0"),
    "index again": (TOPK, (64 + 84, "<i", 1), r"got 1 at position 1"),
    "chunk size": (
        "sign_32",
        (12, "<I", 48),
        r"chunk_size of a PackedSigns must be one of \(32, 64.*, got 48",
    ),
    "tail of words": ("sign_32", (64 + 16, "<I", 8), r"words: bits from 131 on must be 0"),
    "padding": ("sign_32", (64 + 31, "B", 1), r"padding in bytes \[20, 32\) must be 0"),
    "padding at the end": ("sign_32", (64 + 63, "B", 1), r"padding in bytes \[52, 64\) must be 0"),
    "scale": ("sign_32", (64 + 39, "B", 0xC0), r"scales: the sign bit must be 0, got -.* at position 1"),
    "k of chunks": (CHUNKS, (24, "<Q", 65), r"k of a ChunkSparse must be in \[1, 64\], got 65"),
    "no k of chunks": (CHUNKS, (24, "<Q", 0), r"k of a ChunkSparse must be in \[1, 64\], got 0"),
    "12 bits": (CHUNKS, (12, "<I", 8192), r"index_codec of a ChunkSparse must be one of \(3,\), got 4"),
    "bits of chunks": (
        CHUNKS,
        (8, "B", 3),
        r"bits of a ChunkSparse must be one of \(32, 16, 8, 4, 2\), got 3",
    ),
    "half a code": (CHUNKS, (64 + 4, "B", 0x10), r"values of chunk 0: bits from 36 on must be 0"),
    "unused value": (CHUNKS, (64 + 12, "B", 0x10), r"values of chunk 2: bits from 20 on must be 0"),
    "unused index": (CHUNKS, (64 + 32 + 28 + 10, "B", 1), r"indices of chunk 2: bits from 60 on must be 0"),
    "half an index": (CHUNKS, (64 + 32 + 13, "B", 0x90), r"indices of chunk 0: bits from 108 on must be 0"),
    "order": (
        CHUNKS,
        (64 + 32, "<H", 0xFFF),
        r"chunk 0: indices must ascend within \[0, 128\), got 4095 at position 0",
    ),
    "short chunk": (
        CHUNKS,
        (64 + 32 + 28 + 6, "B", 5),
        r"chunk 2: indices must ascend within \[0, 5\), got 5 at",
    ),
    "tail of codes": ("quantize_4_bits", (64 + 100, "B", 0x10), r"codes: bits from 804 on must be 0"),
    "mean of 4 bits": (
        "quantize_4_bits",
        (10, "<H", 2),
        r"flags of a Quantized must be one of \(0,\), got 2",
    ),
    "codec of coded": (CODED, (7, "B", 2), r"index_codec of a CodedSparse must be one of \(1, 5, 6\), got 2"),
    "codec of long coded": ("coded_int32_int64", (7, "B", 1), r"index_codec of a .* \(2, 5, 6\), got 1"),
    "bits of coded": (CODED, (8, "B", 2), r"bits of a CodedSparse must be one of \(8, 4\), got 2"),
    "no k of coded": (CODED, (24, "<Q", 0), r"k of a CodedSparse must be in \[1, 200\], got 0"),
    "tail of coded": (CODED, (64 + 10, "B", 0x10), r"values: bits from 84 on must be 0"),
    "scale of coded": (CODED, (64 + 19, "B", 0xC0), r"scales: the sign bit must be 0"),
    "tail of lower bits": (CODED, (64 + 32 + 7, "B", 0x80), r"lower bits: bits from 63 on must be 0"),
    "tail of upper bits": (CODED, (64 + 48 + 7, "B", 1), r"upper bits: bits from 47 on must be 0"),
    "too few": (CODED, (64 + 48, "<Q", sum(1 << 2 * i for i in range(20))), r"of k=21 indices, got 20"),
    "too many": (CODED, (64 + 48, "<Q", (1 << 40) - 1), r"of k=21 indices, got more"),
    "index again, coded": (CODED, (64 + 32, "<Q", 0), r"ascend strictly, not so at position \d+$"),
    "index too large": (
        CODED,
        (64 + 48, "<Q", sum(1 << 2 * i for i in range(20)) + (1 << 46)),
        r"indices must be below 200, got 21\d at position 20",
    ),
    "first end": (BLOCKS, (64 + 48, "<i", -1), r"from 0 to k=5, got -1 of block 0"),
    "end": (BLOCKS, (64 + 52, "<i", 1), r"from 0 to k=5, got 1 of block 1"),
    "last end": (BLOCKS, (64 + 60, "<i", 6), r"from 0 to k=5, got 6 of block 3"),
    "order in a block": (BLOCKS, (64 + 34, "<H", 5), r"within each block, got 5 after 5 at position 1"),
    "no first of a block": (
        BLOCKS,
        (64 + 56, "<i", 3),
        r"within each block, got 3391 after 8928 at position 4",
    ),
    "position": (BLOCKS, (64 + 40, "<H", 3392), r"in the last block must be below 3392, got 3392"),
    "no values": ("random_k_fp32", (24, "<Q", 0), r"k of a SeededValues must be in \[1, 200\], got 0"),
    "dtype of factors": (FACTORS, (6, "B", 2), r"dtype of a LowRankFactors must be one of \(1,\), got 2"),
    "codes of factors": (FACTORS, (6, "B", 0), r"dtype of a LowRankFactors must be one of \(1,\), got 0"),
    "bits of factors": (FACTORS, (8, "B", 16), r"bits of a LowRankFactors must be one of \(32,\), got 16"),
    "no columns": (FACTORS, (12, "<I", 0), r"chunk_size of a LowRankFactors must be in \[1, 607\], got 0"),
    "columns": (FACTORS, (12, "<I", 608), r"chunk_size of a .* must be in \[1, 607\], got 608"),
    "columns huge": (FACTORS, (12, "<I", 2**32 - 1), r"in \[1, 607\], got 4294967295"),
    "other columns": (FACTORS, (12, "<I", 21), r"body_nbytes of a LowRankFactors .* must be 608, got 624"),
    "columns below rank": (FACTORS, (12, "<I", 2), r"k of a LowRankFactors must be in \[1, 2\], got 3"),
    "rows below rank": (FACTORS, (12, "<I", 500), r"k of a LowRankFactors must be in \[1, 2\], got 3"),
    "no rank": (FACTORS, (24, "<Q", 0), r"k of a LowRankFactors must be in \[1, 20\], got 0"),
    "rank": (FACTORS, (24, "<Q", 21), r"k of a LowRankFactors must be in \[1, 20\], got 21"),
    "rank huge": (FACTORS, (24, "<Q", 2**64 - 1), r"k of a .* in \[1, 20\], got 18446744073709551615"),
    "another rank": (FACTORS, (24, "<Q", 4), r"body_nbytes of a LowRankFactors .* must be 816, got 624"),
    "numel of factors": (
        FACTORS,
        (16, "<Q", 2**62),
        r"body_nbytes of a LowRankFactors of 4611686018427387904",
    ),
    "columns of nothing": (
        FACTORS,
        (16, "<Q", 0),
        r"chunk_size of a LowRankFactors must be in \[0, 0\], got 20",
    ),
    "seed of factors": (FACTORS, (32, "<q", 1), r"seed of a LowRankFactors must be one of \(0,\), got 1"),
    "padding of factors": (FACTORS, (64 + 31 * 3 * 4, "B", 1), r"padding in bytes \[372, 384\) must be 0"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(change: str) -> None:
    name, (offset, form, value), text = REFUSED[change]
    with pytest.raises(CorruptPayloadError, match=rf"^from_bytes: .*{text}"):
        gck.from_bytes(put(plain(name), offset, form, value))


@pytest.mark.parametrize("numel", [2**45, 2**60, 2**62])
def test_a_claim_of_more_elements_than_fit_is_refused_by_name(numel: int) -> None:
    payload = gck.topk(torch.randn(1000), k=3)._replace(numel=numel)
    honest = gck.from_bytes(gck.to_bytes(payload))
    for given in (honest, [honest]):
        with pytest.raises(AllocationError, match=rf"^decompress: {numel} elements .* max_numel"):
            gck.decompress(given)


@pytest.mark.parametrize("device", ["foo", "xla", *([] if torch.cuda.is_available() else ["cuda"]), 1.5])
def test_a_device_that_is_not_here(device: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^from_bytes: device must be one that torch can use here, got "):
        gck.from_bytes(message_of(TOPK), device=device)


def test_versions() -> None:
    with pytest.raises(PayloadVersionError, match="the message is of version 2, this gck reads version 1"):
        gck.from_bytes(put(message_of(TOPK), 4, "B", 2))


def test_numel_is_bounded_by_the_receiver() -> None:
    data = message_of("topk_int64")
    assert gck.from_bytes(data, max_numel=2**40 + 1).numel == 2**40 + 1
    with pytest.raises(CorruptPayloadError, match=r"numel must be at most max_numel=1000, got 1099511627777"):
        gck.from_bytes(data, max_numel=1000)
    with pytest.raises(CorruptPayloadError, match=r"^read_header: .*max_numel=1000, got 1099511627777"):
        message.read_header(data[:64], max_numel=1000)
    with pytest.raises(ArgumentError, match="max_numel must be at least 0, got -1"):
        gck.from_bytes(data, max_numel=-1)
    with pytest.raises(DtypeError, match=r"max_numel must be an int or None, got 1000000.0 \(float\)"):
        gck.from_bytes(data, max_numel=1e6)  # type: ignore[arg-type]


def test_what_is_not_finite_passes() -> None:
    assert gck.from_bytes(message_of("topk_nonfinite")).values.isnan().any()
    assert gck.from_bytes(message_of("sign_nonfinite")).scales.isnan().any()
    assert gck.from_bytes(message_of("quantize_nonfinite")).scales.isinf().any()
    assert gck.from_bytes(message_of("low_rank_nonfinite")).right.isnan().any()


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (5, DtypeError, r"got 5 \(int\)"),
        ("text", DtypeError, r"got 'text' \(str\)"),
        (torch.zeros(64), DtypeError, r"got a tensor of shape \(64,\), torch.float32"),
        (torch.zeros(2, 64, dtype=torch.uint8), DtypeError, r"got a tensor of shape \(2, 64\)"),
        (memoryview(bytes(128))[::2], LayoutError, r"got strides \(2,\)"),
        (b"", CorruptPayloadError, "got 0 bytes"),
    ],
    ids=["int", "str", "floats", "matrix", "strided", "nothing"],
)
def test_what_is_no_message(data: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^from_bytes: .*{text}"):
        gck.from_bytes(data)


GOOD = gck.SparseGrad(torch.ones(2), torch.tensor([1, 3], dtype=torch.int32), 5)
SIGNS = gck.PackedSigns(torch.zeros(1, dtype=torch.int32).view(torch.uint32), torch.ones(1), 20, 32)
BLOCK16 = gck.encode_indices(GOOD, "block16")
RANK_2 = gck.LowRankFactors(torch.ones(2, 4), torch.ones(2, 6), 23, 6)
BAD_PAYLOADS: list[tuple[Any, type[Exception], str]] = [
    ([GOOD], DtypeError, r"payload must be a payload of gck, got \[.* \(list\)"),
    (
        GOOD._replace(values=[1.0]),
        DtypeError,
        r"payload.values must be a tensor or an int, got \[1.0\] \(list\)",
    ),
    (GOOD._replace(values=5), DtypeError, r"fields of a payload must be tensors, got 5 \(int\)"),
    (GOOD._replace(values=torch.ones(4)[::2]), LayoutError, "payload.values must be contiguous"),
    (
        GOOD._replace(values=torch.ones(2).double()),
        DtypeError,
        "payload.values must be one of .* got torch.float64",
    ),
    (GOOD._replace(numel=5.0), DtypeError, r"payload.numel must be a tensor or an int, got 5.0 \(float\)"),
    (GOOD._replace(numel=-1), CorruptPayloadError, r"payload.numel must be in \[0, 2\*\*63\), got -1"),
    (
        GOOD._replace(numel=3),
        CorruptPayloadError,
        r"indices must ascend within \[0, 3\), got 3 at position 1",
    ),
    (GOOD._replace(numel=1), CorruptPayloadError, r"k of a SparseGrad must be in \[0, 1\], got 2"),
    (GOOD._replace(values=torch.ones(1, 2)), CorruptPayloadError, "fields of this SparseGrad must be"),
    (
        GOOD._replace(values=torch.ones(3)),
        CorruptPayloadError,
        "body_nbytes|fields of this SparseGrad must be",
    ),
    (SIGNS._replace(chunk_size=48), CorruptPayloadError, "chunk_size of a PackedSigns must be one of"),
    (
        SIGNS._replace(words=torch.full((1,), -1).int().view(torch.uint32)),
        CorruptPayloadError,
        "bits from 20 on",
    ),
    (BLOCK16._replace(index_codec="gap"), CorruptPayloadError, "payload.index_codec must be one of .*'gap'"),
    (BLOCK16._replace(index_codec=6), DtypeError, r"payload.index_codec must be a str, got 6 \(int\)"),
    (BLOCK16._replace(value_bits=2), CorruptPayloadError, "bits of a CodedSparse must be one of"),
    (BLOCK16._replace(value_bits=8), CorruptPayloadError, "body_nbytes|fields of this CodedSparse must be"),
    (BLOCK16._replace(k=-1), CorruptPayloadError, r"k of a CodedSparse must be in \[1, 5\], got -1"),
    (BLOCK16._replace(numel=65537), CorruptPayloadError, "fields of this CodedSparse must be"),
    (BLOCK16._replace(numel=3), CorruptPayloadError, "indices in the last block must be below 3, got 3"),
    (SIGNS._replace(numel=65), CorruptPayloadError, "body_nbytes|fields of this PackedSigns must be"),
    (RANK_2._replace(columns=0), CorruptPayloadError, r"chunk_size of a .* must be in \[1, 23\], got 0"),
    (RANK_2._replace(columns=-6), CorruptPayloadError, r"chunk_size of a .* must be in \[1, 23\], got -6"),
    (RANK_2._replace(columns=True), DtypeError, r"payload.columns must be .* an int, got True \(bool\)"),
    (RANK_2._replace(columns=6.0), DtypeError, r"payload.columns must be .* an int, got 6.0 \(float\)"),
    (RANK_2._replace(columns=7), CorruptPayloadError, "body_nbytes|fields of this LowRankFactors must be"),
    (RANK_2._replace(numel=18), CorruptPayloadError, "fields of this LowRankFactors must be"),
    (RANK_2._replace(numel=0), CorruptPayloadError, r"chunk_size of a .* must be in \[0, 0\], got 6"),
    (RANK_2._replace(left=torch.zeros(2, 5)), CorruptPayloadError, "body_nbytes|fields of this LowRank"),
    (RANK_2._replace(left=torch.zeros(5, 4)), CorruptPayloadError, r"k of a .* must be in \[1, 4\], got 5"),
    (RANK_2._replace(left=torch.zeros(0, 4)), CorruptPayloadError, r"k of a .* must be in \[1, 4\], got 0"),
    (RANK_2._replace(left=torch.zeros(())), CorruptPayloadError, r"left must be a matrix, got shape \(\)"),
    (RANK_2._replace(right=torch.zeros(12)), CorruptPayloadError, r"right must be a matrix, got .*\(12,\)"),
    (RANK_2._replace(left=torch.zeros(2, 4).half()), DtypeError, "payload.left must be one of .*float16"),
    (RANK_2._replace(right=torch.zeros(2, 6).double()), DtypeError, "payload.right must be one of .*float64"),
]


@pytest.mark.parametrize(("payload", "error", "text"), BAD_PAYLOADS, ids=[text for *_, text in BAD_PAYLOADS])
def test_bad_payloads(payload: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^to_bytes: .*({text})"):
        gck.to_bytes(payload)


def test_without_xxhash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only checksums need it."""
    data, unchecked = message_of(TOPK), plain(TOPK)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(BackendUnavailableError, match=r"^to_bytes: .*pip install xxhash"):
        gck.to_bytes(GOOD)
    with pytest.raises(BackendUnavailableError, match=r"^from_bytes: .*pip install xxhash"):
        gck.from_bytes(data)
    assert gck.to_bytes(gck.from_bytes(unchecked), checksum=False) == unchecked


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu(name: str) -> None:
    checksum = find_spec("xxhash") is not None
    data = gck.to_bytes(CASES[name][0](), checksum=checksum)
    payload = gck.from_bytes(data, device="cuda")
    assert all(field.is_cuda for field in payload.fields)
    assert gck.to_bytes(payload, checksum=checksum) == data
    assert (
        gck.to_bytes(
            gck.from_bytes(torch.tensor(list(data), dtype=torch.uint8, device="cuda")), checksum=checksum
        )
        == data
    )


@pytest.mark.parametrize("seed", [torch.tensor(5), IntEnum("Seed", "five")["five"]], ids=["tensor", "enum"])
def test_a_seed_is_an_int(seed: Any) -> None:
    """One of another class would be looked for among all 2**64 seeds."""
    payload = gck.random_k(torch.randn(1000), 0.01, seed=3)._replace(seed=seed)
    with pytest.raises(DtypeError, match=r"to_bytes: payload\.seed must be an int, got"):
        gck.to_bytes(payload)
