"""Messages with coded indices are accepted when the oracle of codecs decodes them, and else refused."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck
from gck.coded_layout import index_fields
from gck.errors import CorruptPayloadError
from gck.kernels.index_codecs import reference
from gck.message import coded_indices
from gck.message.coded_indices import check_elias_fano
from tests.message import by_hand, hostile
from tests.message.hostile import attempt

CODECS = ("block16", "elias_fano")
CHECKSUM = find_spec("xxhash") is not None


def payload_of(codec: str, numel: int, k: int, low: Tensor, high: Tensor) -> gck.CodedSparse:
    return gck.CodedSparse(torch.ones(k), torch.empty(0), low, high, numel, k, codec)


def encoded(codec: str, numel: int, indices: Tensor) -> gck.CodedSparse:
    return payload_of(codec, numel, len(indices), *reference.encode(codec, indices, numel))


def changed(draw: st.DrawFn, field: Tensor) -> Tensor:
    """A few bits turned, one entry copied to the next, or all of it noise."""
    octets = field.clone().view(torch.uint8)
    if not octets.numel():
        return field
    how = draw(st.sampled_from(["as it is", "bits", "bits", "entry", "noise", "zeros"]))
    if how == "bits":
        for bit in draw(st.lists(st.integers(0, 8 * len(octets) - 1), min_size=1, max_size=3)):
            octets[bit // 8] ^= 1 << bit % 8
    elif how == "entry" and field.numel() > 1:
        at = draw(st.integers(1, field.numel() - 1))
        field = field.clone()
        field[at] = field[at - 1]
        return field
    elif how == "noise":
        octets = torch.tensor(list(draw(st.binary(min_size=len(octets), max_size=len(octets)))))
        octets = octets.to(torch.uint8)
    elif how == "zeros":
        octets.zero_()
    return octets.view(field.dtype)


@st.composite
def coded(draw: st.DrawFn) -> gck.CodedSparse:
    codec = draw(st.sampled_from(CODECS))
    large = [70_000, 131_072, 300_001]
    if codec == "elias_fano":
        large += [2**31 - 1, 2**40 + 7, 2**62 + 1]
    numel = draw(st.one_of(st.integers(1, 300), st.sampled_from(large)))
    k = min(numel, draw(st.integers(1, 70)))
    top = min(numel, draw(st.sampled_from([2 * k, 40 * k, numel])))
    some = draw(st.sets(st.integers(0, top - 1), min_size=k, max_size=k)) if top > 2 * k else range(k)
    indices = torch.tensor(sorted(some), dtype=torch.int32 if numel < 2**31 else torch.int64)
    if draw(st.booleans()):
        indices = (numel - 1 - indices).flip(0)
    low, high = reference.encode(codec, indices, numel)
    return payload_of(codec, numel, k, changed(draw, low), changed(draw, high))


def decodes(payload: gck.CodedSparse) -> bool:
    fields = payload.index_low, payload.index_high
    return attempt(lambda: reference.decode(payload.index_codec, fields, payload.numel, payload.k))


# What is unpacked together: little, so that there are several blocks, or all
@pytest.mark.parametrize("nbytes", [3, None])
def test_accepted_as_the_oracle_does(nbytes: int | None) -> None:
    accepted = []

    @settings(max_examples=300, deadline=None)
    @given(coded())
    def run(payload: gck.CodedSparse) -> None:
        data = by_hand.message(payload, CHECKSUM)
        got = hostile.parse(data, None)
        assert (got is not None) == decodes(payload)
        accepted.append(got is not None)
        hostile.check(data)

    with pytest.MonkeyPatch.context() as patch:
        if nbytes is not None:
            patch.setattr(coded_indices, "STRING_NBYTES", nbytes)
            patch.setattr(coded_indices, "ENTRIES", nbytes)
        run()
    assert 20 < sum(accepted) < len(accepted) - 20


@pytest.mark.parametrize("numel", [41, 170])
@pytest.mark.parametrize("codec", CODECS)
def test_an_index_twice_at_any_place(codec: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is looked at together ends, too; without lower bits, and with two of them."""
    monkeypatch.setattr(coded_indices, "STRING_NBYTES", 1)
    monkeypatch.setattr(coded_indices, "ENTRIES", 4)
    k = 40
    indices = (torch.arange(k) * numel // k).to(torch.int32)
    assert gck.from_bytes(by_hand.message(encoded(codec, numel, indices), False)).numel == numel
    for at in range(1, k):
        twice = indices.clone()
        twice[at] = twice[at - 1]
        with pytest.raises(CorruptPayloadError, match=f"ascend strictly.* at position {at}$"):
            gck.from_bytes(by_hand.message(encoded(codec, numel, twice), False))


def test_every_number_of_lower_bits() -> None:
    """In order, and with neighbours exchanged: of upper bits that are the same, or of any."""
    generator = random.Random(2)
    for bits in range(63):
        k = min(11, (2**63 - 1) >> bits)
        numel = k << bits
        dtype = torch.int32 if numel < 2**31 else torch.int64
        for top in (numel, max(k, 1 << bits)):
            indices = torch.tensor(sorted(generator.sample(range(top), k)), dtype=dtype)
            low, high = reference.encode("elias_fano", indices, numel)
            check_elias_fano(low, high, numel, k)
            for at in range(1, k):
                order = [*range(at - 1), at, at - 1, *range(at + 1, k)]
                low, _ = reference.encode("elias_fano", indices[order], numel)
                payload = payload_of("elias_fano", numel, k, low, high)
                assert attempt(lambda p=payload: check_elias_fano(*p[2:6])) == decodes(payload)


@pytest.mark.parametrize("name", ["int32", *CODECS])
def test_memory_of_a_large_message_is_in_proportion(name: str) -> None:
    """And of one whose last index is wrong, at whose end the check must arrive."""
    n = 1 << 20
    x = torch.randn(n, generator=torch.Generator().manual_seed(3))
    for k in (n, n // 2 + 1, n // 7, n // 90):
        compressor = gck.TopK(k=k, index_codec=name, value_bits=4)
        body = torch.zeros(1, compressor.layout(n).nbytes, dtype=torch.uint8)
        compressor.compress_(x, None, body)
        payload = compressor.payload(body[0], n)
        data = gck.to_bytes(payload, checksum=False)
        assert hostile.parse(data, None) is not None
        spoilt = bytearray(data)
        field = payload.index_low if name != "elias_fano" else payload.index_high
        end = 64 + field.data_ptr() - payload.values.data_ptr() + field.numel() * field.element_size()
        spoilt[end - 8 : end] = bytes(8) if name != "elias_fano" else b"\xff" * 8
        assert hostile.parse(bytes(spoilt), None) is None


@pytest.mark.parametrize("numel", [2**62, 2**63 - 1])
def test_vectors_that_no_machine_holds(numel: int) -> None:
    """Elias-Fano says one entry of such in 16 bytes; block16 would take a body that is not there."""
    low, high = gck.kernels.index_codecs.encode("elias_fano", torch.tensor([numel - 1]), numel)
    data = by_hand.message(payload_of("elias_fano", numel, 1, low, high), CHECKSUM)
    payload = hostile.parse(data, None)
    assert isinstance(payload, gck.CodedSparse)
    assert reference.decode("elias_fano", (payload.index_low, payload.index_high), numel, 1) == numel - 1
    short = payload_of("block16", numel, 1, torch.zeros(1, dtype=torch.uint16), torch.ones(4).long())
    with pytest.raises(CorruptPayloadError, match="body_nbytes"):
        gck.from_bytes(by_hand.message(short, False))


def test_block16_of_64_bit_ends() -> None:
    numel = 2**31 + 5
    indices = torch.tensor([0, 65535, 65536, 2**31 + 4])
    low, high = reference.encode("block16", indices, numel)
    assert (high.dtype, high.numel()) == index_fields("block16", numel, 4)[1]
    payload = payload_of("block16", numel, 4, low, high)
    assert hostile.parse(by_hand.message(payload, CHECKSUM), None) is not None
    low[3] = 5
    assert hostile.parse(by_hand.message(payload, CHECKSUM), None) is None
