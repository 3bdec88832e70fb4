"""Index codecs: bytes equal to the reference's on the CPU and in Triton, their sizes, and hostile bytes."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gck.coded_layout import INDEX_CODECS, index_fields
from gck.errors import ArgumentError, CorruptPayloadError, DtypeError, LayoutError, ShapeMismatchError
from gck.kernels import index_codecs
from gck.kernels.index_codecs import reference
from gck.payload import index_dtype
from gck.wire import Layout, body_of
from tests.cases import Guarded, same_bytes

CODED = ("block16", "elias_fano")
GOLDEN = Path(__file__).parents[1] / "golden/index_codecs"
BACKENDS = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def _kernels(backend: str) -> tuple[Any, str]:
    if backend == "cpu":
        return import_module("gck.kernels.index_codecs.cpu"), "cpu"
    if backend == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    return import_module("gck.kernels.index_codecs.gpu"), "cuda" if backend == "cuda" else "cpu"


def drawn(numel: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + numel + k)
    chosen = torch.randperm(numel, generator=generator)[:k] if numel < 10**7 else _far_apart(numel, k)
    return chosen.sort().values.to(index_dtype(numel))


def _far_apart(numel: int, k: int) -> Tensor:
    return (torch.arange(k) * (numel // k) + numel % k) % numel


def spread(numel: int, k: int) -> dict[str, Tensor]:
    """Indices that lie at random, at the start, at the end, in the middle, and at both ends."""
    dtype = index_dtype(numel)
    runs = {"first": 0, "last": numel - k, "middle": (numel - k) // 2}
    made = {name: torch.arange(start, start + k).to(dtype) for name, start in runs.items()}
    both = torch.cat([torch.arange(k // 2), torch.arange(numel - k + k // 2, numel)]).to(dtype)
    return {"random": drawn(numel, k), **made, "both ends": both}


def check(codec: str, backend: str, indices: Tensor, numel: int) -> None:
    """Encodes and decodes between canaries, and compares every byte with the reference."""
    kernels, device = _kernels(backend)
    k = indices.numel()
    wanted = reference.encode(codec, indices, numel)
    assert tuple((field.dtype, field.numel()) for field in wanted) == index_fields(codec, numel, k)
    assert torch.equal(reference.decode(codec, wanted, numel, k), indices)
    memory = [torch.full((field.nbytes + 32,), 0xA5, dtype=torch.uint8, device=device) for field in wanted]
    views = [m[16 : m.numel() - 16].view(field.dtype) for m, field in zip(memory, wanted, strict=True)]
    kernels.encode_(codec, indices.to(device), numel, views)
    for view, field in zip(views, wanted, strict=True):
        assert same_bytes(view, field)
    assert all((m[:16] == 0xA5).all() and (m[m.numel() - 16 :] == 0xA5).all() for m in memory)
    out = Guarded.of(torch.full((k,), -7, dtype=indices.dtype, device=device))
    kernels.decode_(codec, [view.view(1, -1) for view in views], numel, out.inner.view(1, -1))
    assert torch.equal(out.inner.cpu(), indices)
    assert out.intact()


SHAPES = [
    (1, 1),
    (2, 1),
    (64, 64),
    (100, 1),
    (1000, 10),
    (4096, 65),
    (70_000, 700),
    (131_072, 1500),
    (200_001, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", CODED)
def test_bytes_are_the_reference_s(codec: str, backend: str) -> None:
    for i, (numel, k) in enumerate(SHAPES):
        for j, indices in enumerate(spread(numel, k).values()):
            # The interpreter is slow: they take turns.
            if backend != "interpreter" or (i + j) % 3 == 0:
                check(codec, backend, indices, numel)


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_many_entries_and_any_number_of_threads(codec: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for numel, k in ((500_000, 170_001), (200_003, 100_000), (131_072, 131_072)):
            for name in ("random", "both ends") if k < numel else ("first",):
                check(codec, "cpu", spread(numel, k)[name], numel)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("numel", "k"), [(2**31 - 1, 3), (2**31, 5), (2**40 + 7, 1), (2**62, 2), (2**62 + 1, 70)]
)
def test_elias_fano_of_vectors_that_no_machine_holds(numel: int, k: int, backend: str) -> None:
    """Up to 61 lower bits an index, which lie across words; and indices of 64 bits from 2**31 elements on."""
    indices = torch.tensor(sorted({(i * numel) // k + i for i in range(k - 1)} | {numel - 1})).to(
        index_dtype(numel)
    )
    assert indices.numel() == k
    check("elias_fano", backend, indices, numel)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block16_of_64_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 2**31 + 5
    indices = torch.tensor([0, 65_535, 65_536, 2**31 - 1, 2**31, numel - 1])
    kernels, device = _kernels(backend)
    monkeypatch.setattr(kernels, "ENDS", 8192, raising=False)
    fields = [
        torch.empty(count, dtype=dtype, device=device) for dtype, count in index_fields("block16", numel, 6)
    ]
    kernels.encode_("block16", indices.to(device), numel, fields)
    wanted = reference.encode("block16", indices, numel)
    assert all(same_bytes(a, b) for a, b in zip(fields, wanted, strict=True))
    if backend == "interpreter":
        return  # a program for each of 32,769 blocks
    out = torch.empty(1, 6, dtype=torch.int64, device=device)
    kernels.decode_("block16", [field.view(1, -1) for field in fields], numel, out)
    assert torch.equal(out[0].cpu(), indices)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), numel=st.integers(1, 3000))
def test_any_set(data: st.DataObject, numel: int) -> None:
    chosen = data.draw(st.sets(st.integers(0, numel - 1), min_size=1, max_size=200))
    indices = torch.tensor(sorted(chosen), dtype=torch.int32)
    for codec in INDEX_CODECS:
        fields = index_codecs.encode(codec, indices, numel)
        wanted = reference.encode(codec, indices, numel)
        assert all(same_bytes(a, b) for a, b in zip(fields, wanted, strict=True))
        assert same_bytes(index_codecs.decode(codec, fields, numel, len(chosen)), indices)


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("codec", CODED)
def test_rows_of_several_ranks(codec: str, backend: str) -> None:
    kernels, device = _kernels(backend)
    numel, k = 70_000, 300
    rows = [drawn(numel, k, seed) for seed in range(3)]
    fields = [
        torch.stack(f) for f in zip(*(reference.encode(codec, row, numel) for row in rows), strict=True)
    ]
    # As they lie in gathered bodies: one stride of a multiple of 16 bytes for all fields.
    memory = torch.zeros(3, 4096, dtype=torch.uint8, device=device)
    views, offset = [], 0
    for field in fields:
        nbytes = field[0].nbytes
        views.append(memory[:, offset : offset + nbytes].view(field.dtype))
        views[-1].copy_(field)
        offset += -(-nbytes // 16) * 16
    out = torch.empty(3, k, dtype=torch.int32, device=device)
    kernels.decode_(codec, views, numel, out)
    assert torch.equal(out.cpu(), torch.stack(rows))


def test_sizes_follow_from_the_numbers_alone() -> None:
    for numel in (1, 10, 1000, 123_457, 2**31 - 1, 2**31):
        for k in {1, min(numel, 7), max(1, numel // 100), max(1, numel // 3)}:
            low = math.floor(math.log2(numel / k))
            bits = (k * low, k + (numel >> low) + 1)
            wide = 8 if numel > 2**31 - 1 else 4
            assert [count for _, count in index_fields("elias_fano", numel, k)] == [
                -(-b // 64) * 8 for b in bits
            ]
            assert [count for _, count in index_fields("block16", numel, k)] == [k, -(-numel // 65_536)]
            assert [dtype.itemsize for dtype, _ in index_fields("block16", numel, k)] == [2, wide]
            assert index_fields("int32", numel, k) == ((index_dtype(numel), k), (torch.uint8, 0))
    for codec in CODED:
        assert [count for _, count in index_fields(codec, 100, 0)] == [0, 0]
        nothing = index_codecs.encode(codec, torch.empty(0, dtype=torch.int32), 100)
        assert index_codecs.decode(codec, nothing, 100, 0).numel() == 0


def damaged(codec: str) -> dict[str, tuple[Tensor, ...]]:
    """Fields of 50 of 5000 elements (of 3 blocks' elements, with block16) that no indices have."""
    numel = NUMEL[codec]
    fields = index_codecs.encode(codec, drawn(numel, 50), numel)

    def changed(which: int, **bytes_: int) -> tuple[Tensor, ...]:
        copies = tuple(field.clone() for field in fields)
        for place, value in bytes_.items():
            raw = copies[which].view(torch.uint8)
            raw[int(place.removeprefix("at").replace("m", "-"))] = value
        return copies

    def filled(which: int, value: int) -> tuple[Tensor, ...]:
        copies = tuple(field.clone() for field in fields)
        copies[which].view(torch.uint8).fill_(value)
        return copies

    made = {f"field {i} of {value:#x}": filled(i, value) for i in (0, 1) for value in (0, 0xFF)}
    if codec == "block16":
        del made["field 1 of 0xff"]  # -1, below
        ends = {
            "ends fall": [20, 19, 50],
            "an end is negative": [-1, 19, 50],
            "an end is huge": [2**31 - 1, 50, 50],
            "fewer": [10, 20, 49],
            "more": [10, 20, 51],
        }
        made |= {name: (fields[0], torch.tensor(e, dtype=torch.int32)) for name, e in ends.items()}
        last = torch.arange(65_486, 65_536).to(torch.uint16)
        made["past the end"] = (last, torch.tensor([0, 0, 50], dtype=torch.int32))
        same = torch.full((50,), 7).to(torch.uint16)
        made["the same index twice"] = (same, torch.tensor([50, 50, 50], dtype=torch.int32))
    else:
        del made["field 0 of 0x0"], made["field 0 of 0xff"]
        made["lower padding"] = changed(0, atm1=0x80)
        made["upper padding"] = changed(1, atm1=0x80)
        ones = torch.zeros(fields[1].numel() * 8, dtype=torch.int64)
        ones[:50] = 1
        made["the same index twice"] = (torch.zeros_like(fields[0]), reference._bytes(ones))
        ones[:50], ones[79:129] = 0, 1
        made["past the end"] = (reference._bytes(torch.ones(300, dtype=torch.int64)), reference._bytes(ones))
    return made


NUMEL = {"elias_fano": 5000, "block16": 150_000}


@pytest.mark.parametrize("codec", CODED)
def test_hostile_bytes_are_refused(codec: str) -> None:
    numel = NUMEL[codec]
    for fields in damaged(codec).values():
        with pytest.raises(CorruptPayloadError):
            reference.decode(codec, fields, numel, 50)
        with pytest.raises(CorruptPayloadError, match=f"{codec} indices: "):
            index_codecs.decode(codec, fields, numel, 50)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_bytes_are_refused_where_the_reference_refuses(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(CODED))
    numel = data.draw(st.sampled_from([1, 9, 64, 700, 140_000]))
    k = data.draw(st.integers(1, min(numel, 40)))
    if data.draw(st.booleans()):  # near to what is right: a byte or two are others
        fields = [f.view(torch.uint8).clone() for f in reference.encode(codec, drawn(numel, k), numel)]
        for _ in range(data.draw(st.integers(0, 2))):
            field = data.draw(st.sampled_from([f for f in fields if f.numel()]))
            field[data.draw(st.integers(0, field.numel() - 1))] = data.draw(st.integers(0, 255))
    else:
        sizes = [dtype.itemsize * count for dtype, count in index_fields(codec, numel, k)]
        fields = [
            torch.frombuffer(
                bytearray(data.draw(st.binary(min_size=s, max_size=s)) + b"x"), dtype=torch.uint8
            )[:s]
            for s in sizes
        ]
    typed = tuple(
        f.clone().view(dtype) for f, (dtype, _) in zip(fields, index_fields(codec, numel, k), strict=True)
    )
    try:
        wanted = reference.decode(codec, typed, numel, k)
    except CorruptPayloadError:
        with pytest.raises(CorruptPayloadError):
            index_codecs.decode(codec, typed, numel, k)
    else:
        assert torch.equal(index_codecs.decode(codec, typed, numel, k), wanted)


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("codec", CODED)
def test_any_bytes_stay_in_bounds(codec: str, backend: str) -> None:
    """On a GPU they are not refused, but no index comes out below 0 or above numel."""
    kernels, device = _kernels(backend)
    numel = NUMEL[codec]
    generator = torch.Generator().manual_seed(0)
    cases = list(damaged(codec).values())
    for _ in range(4):
        sizes = [dtype.itemsize * count for dtype, count in index_fields(codec, numel, 50)]
        noise = [torch.randint(0, 256, (s,), generator=generator).to(torch.uint8) for s in sizes]
        cases.append(
            tuple(f.view(dtype) for f, (dtype, _) in zip(noise, index_fields(codec, numel, 50), strict=True))
        )
    for fields in cases:
        out = Guarded.of(torch.full((50,), -7, dtype=torch.int32, device=device))
        kernels.decode_(codec, [f.to(device).view(1, -1) for f in fields], numel, out.inner.view(1, -1))
        assert ((out.inner >= 0) & (out.inner <= numel)).all()
        assert out.intact()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", CODED)
def test_indices_that_do_not_ascend(codec: str, backend: str) -> None:
    """The CPU refuses to encode them, a GPU writes nothing out of bounds."""
    kernels, device = _kernels(backend)
    for bad in ([5, 4, 900], [1, 1, 2], [-1, 2, 3], [1, 2, 1000], [2**31 - 1, 0, -(2**31)]):
        indices = torch.tensor(bad, dtype=torch.int32, device=device)
        memory = [
            torch.full((16 + dtype.itemsize * count + 16,), 0xA5, dtype=torch.uint8, device=device)
            for dtype, count in index_fields(codec, 1000, 3)
        ]
        views = [
            m[16:-16].view(dtype) for m, (dtype, _) in zip(memory, index_fields(codec, 1000, 3), strict=True)
        ]
        if backend == "cpu":
            with pytest.raises(CorruptPayloadError, match=r"ascend within \[0, 1000\)"):
                kernels.encode_(codec, indices, 1000, views)
            assert all((m == 0xA5).all() for m in memory)
        else:
            kernels.encode_(codec, indices, 1000, views)
            assert all((m[:16] == 0xA5).all() and (m[-16:] == 0xA5).all() for m in memory)


def test_fields_at_odd_addresses() -> None:
    indices = drawn(5000, 50)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        low, high = index_codecs.encode("elias_fano", indices.to(device), 5000)
        odd = [torch.cat([f[:1], f])[1:] for f in (low, high)]
        assert odd[0].data_ptr() % 2
        assert torch.equal(index_codecs.decode("elias_fano", odd, 5000, 50).cpu(), indices)


def test_wrong_arguments() -> None:
    indices = drawn(1000, 10)
    fields = index_codecs.encode("elias_fano", indices, 1000)
    with pytest.raises(ArgumentError, match='must be one of "int32", "block16", "elias_fano", got \'zip\''):
        index_codecs.encode("zip", indices, 1000)
    with pytest.raises(DtypeError, match=r"indices must be torch\.int32, got torch\.int64"):
        index_codecs.encode("elias_fano", indices.long(), 1000)
    with pytest.raises(ShapeMismatchError, match="k at most 9"):
        index_codecs.encode("elias_fano", indices, 9)
    with pytest.raises(LayoutError, match="contiguous"):
        index_codecs.encode("elias_fano", indices[::2], 1000)
    with pytest.raises(DtypeError, match=r"numel must be an int, got 1000.0 \(float\)"):
        index_codecs.encode("elias_fano", indices, 1e3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="numel must be at least 0, got -1"):
        index_codecs.decode("elias_fano", fields, -1, 0)
    with pytest.raises(ArgumentError, match=r"k must be in \[0, numel = 1000\], got 1001"):
        index_codecs.decode("elias_fano", fields, 1000, 1001)
    with pytest.raises(DtypeError, match=r"k must be an int, got True \(bool\)"):
        index_codecs.decode("elias_fano", fields, 1000, True)
    with pytest.raises(CorruptPayloadError, match="fields of 11 indices must be"):
        index_codecs.decode("elias_fano", fields, 1000, 11)
    with pytest.raises(CorruptPayloadError, match="fields of 10 indices must be"):
        index_codecs.decode("elias_fano", fields[:1], 1000, 10)
    with pytest.raises(CorruptPayloadError, match="fields of 10 indices must be"):
        index_codecs.decode("block16", fields, 1000, 10)


GOLDEN_SHAPES = [(300, 300), (1000, 10), (200_000, 40), (2**31, 5)]


@pytest.mark.parametrize(("numel", "k"), GOLDEN_SHAPES)
@pytest.mark.parametrize("codec", INDEX_CODECS)
def test_golden_files_of_version_1(codec: str, numel: int, k: int) -> None:
    """Bodies that an earlier version wrote: they are written as before, and can be read."""
    if codec == "block16" and numel == 2**31:
        pytest.skip("ends of 32,768 blocks are no small file")
    # Not drawn: what torch draws may change.
    indices = torch.tensor(
        [i * numel // k + i * i % (numel // k) for i in range(k)], dtype=index_dtype(numel)
    )
    body = (GOLDEN / f"{codec}-{numel}-{k}.bin").read_bytes()
    layout = Layout.of(*index_fields(codec, numel, k))
    held = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    assert same_bytes(body_of(*index_codecs.encode(codec, indices, numel)), held)
    assert same_bytes(body_of(*reference.encode(codec, indices, numel)), held)
    assert same_bytes(index_codecs.decode(codec, layout.views(held), numel, k), indices)
