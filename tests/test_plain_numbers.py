"""Numbers of NumPy's, as configurations hold them, do what plain ones do, and leave no trace."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import gck
from gck.collectives.cost import Link
from gck.collectives.pieces import choose_piece_numel
from gck.compressor import describe
from gck.values import plain_int, plain_real
from tests.cases import same_bytes

np = pytest.importorskip("numpy")

INTS = [np.int64, np.int32, np.uint16]
FLOATS = [np.float64, np.float32, np.float16]
# Exactly representable, so that all types say the same number.
COMPRESSORS: dict[str, tuple[type, dict[str, Any]]] = {
    "topk ratio": (gck.TopK, {"ratio": 0.25, "decay": 0.5, "clip": 2.0}),
    "topk k": (gck.TopK, {"k": 5, "value_bits": 8}),
    "sign": (gck.Sign, {"chunk_size": 64, "decay": 0.5, "clip": 2.0}),
    "quantize": (gck.Quantize, {"bits": 8, "chunk_size": 64, "seed": 7, "first": 128, "decay": 0.5}),
    "chunk_topk": (
        gck.ChunkTopK,
        {"k": 5, "chunk_size": 64, "value_bits": 8, "index_bits": 12, "server_k": 9, "clip": 0.5},
    ),
    "random_k k": (gck.RandomK, {"k": 5, "seed": 7}),
    "random_k ratio": (gck.RandomK, {"ratio": 0.25, "seed": 7}),
    "low_rank": (gck.LowRank, {"rank": 3, "columns": 20, "seed": 7, "decay": 0.5, "clip": 2.0}),
    "link": (Link, {"latency": 0.5, "bandwidth": 1024.0, "burst": 2.0}),
}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "topk_ef_ ratio": (gck.topk_ef_, {"ratio": 0.25}),
    "topk_ef_ k": (gck.topk_ef_, {"k": 5}),
    "topk_ef_ decay": (gck.topk_ef_, {"k": 5, "decay": 0.5, "clip": 2.0}),
    "sign_ef_": (gck.sign_ef_, {"chunk_size": 64}),
    "sign_ef_ decay": (gck.sign_ef_, {"chunk_size": 64, "decay": 0.5, "clip": 2.0}),
    "quantize_ef_": (gck.quantize_ef_, {"bits": 8, "chunk_size": 64, "rounding": "stochastic", "seed": 7}),
    "quantize_ef_ decay": (gck.quantize_ef_, {"bits": 2, "chunk_size": 64, "decay": 0.5, "clip": 2.0}),
    "chunk_topk_ef_": (gck.chunk_topk_ef_, {"chunk_size": 64, "k": 5, "value_bits": 8}),
    "chunk_topk_ef_ decay": (gck.chunk_topk_ef_, {"chunk_size": 64, "k": 5, "decay": 0.5, "clip": 2.0}),
    "random_k_ef_": (gck.random_k_ef_, {"k": 5, "seed": 7}),
    "random_k_ef_ ratio": (gck.random_k_ef_, {"ratio": 0.25, "seed": 7}),
    "low_rank_ef_": (gck.low_rank_ef_, {"rank": 3, "seed": 7}),
    "low_rank_ef_ decay": (gck.low_rank_ef_, {"columns": 20, "seed": 7, "decay": 0.5, "clip": 2.0}),
}


def of_numpy(options: dict[str, Any], whole: Any, fraction: Any) -> dict[str, Any]:
    kinds = {int: whole, float: fraction}
    return {name: kinds.get(type(value), lambda same: same)(value) for name, value in options.items()}


def assert_same_payload(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert same_bytes(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize(("whole", "fraction"), list(zip(INTS, FLOATS, strict=True)))
def test_compressors(name: str, whole: Any, fraction: Any) -> None:
    kind, options = COMPRESSORS[name]
    ours, plain = kind(**of_numpy(options, whole, fraction)), kind(**options)
    assert {n: type(getattr(ours, n)) for n in options} == {n: type(v) for n, v in options.items()}
    assert ours == plain
    assert hash(ours) == hash(plain)
    assert repr(ours) == repr(plain)
    assert describe(ours) == describe(plain)
    assert pickle.dumps(ours) == pickle.dumps(plain)


@pytest.mark.parametrize("numel", [1000, 100_000])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("whole", "fraction"), list(zip(INTS, FLOATS, strict=True)))
def test_functions_with_error_feedback(name: str, whole: Any, fraction: Any, numel: int) -> None:
    function, options = CALLS[name]
    grad, errs = torch.randn(numel), [torch.ones(numel), torch.ones(numel)]
    theirs = function(grad, errs[0], **options)
    for _ in range(2):  # what is remembered of a first call is that of its types
        errs[1].fill_(1)
        ours = function(grad, errs[1], **of_numpy(options, whole, fraction))
        assert_same_payload(ours, theirs)
        assert same_bytes(*errs)
    assert same_bytes(gck.decompress(ours), gck.decompress(theirs))
    assert gck.to_bytes(ours) == gck.to_bytes(theirs)
    assert gck.from_bytes(gck.to_bytes(ours), max_numel=np.int64(numel)).numel == numel


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (gck.topk, {"ratio": 0.25}),
        (gck.topk, {"k": 5}),
        (gck.quantize, {"bits": 8, "chunk_size": 64, "seed": 7}),
        (gck.chunk_topk, {"chunk_size": 64, "k": 5, "value_bits": 8}),
        (gck.random_k, {"k": 5, "seed": 7}),
        (gck.random_k, {"ratio": 0.25, "seed": 7}),
        (gck.low_rank, {"rank": 3, "columns": 20, "seed": 7}),
    ],
)
def test_functions_without(function: Any, options: dict[str, Any]) -> None:
    x = torch.randn(1000)
    assert_same_payload(function(x, **of_numpy(options, np.int32, np.float32)), function(x, **options))


def test_lists() -> None:
    grads = [torch.randn(300), torch.randn(20)]
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"k": [np.int64(5), np.int32(2)]}, {"k": [5, 2]}),
        ({"k": np.int64(5)}, {"k": 5}),
        ({"ratio": np.float32(0.25)}, {"ratio": 0.25}),
    ]
    for ours, plain in given:
        for a, b in zip(
            gck.topk_ef_(grads, [torch.ones(300), torch.ones(20)], **ours),
            gck.topk_ef_(grads, [torch.ones(300), torch.ones(20)], **plain),
            strict=True,
        ):
            assert_same_payload(a, b)


def test_alpha() -> None:
    payload = gck.sign_ef_(torch.randn(1000), torch.zeros(1000))
    wanted = gck.decompress_add_(torch.ones(1000), payload, 0.5)
    for kind in (*FLOATS, Fraction):
        assert same_bytes(gck.decompress_add_(torch.ones(1000), payload, kind(0.5)), wanted)
    with pytest.raises(gck.errors.ArgumentError, match="alpha must be a finite number"):
        gck.decompress_add_(torch.ones(1000), payload, np.float32("nan"))


def test_collectives_of_ranks_that_give_different_types() -> None:
    def rank_main(member: Any) -> torch.Tensor:
        whole = np.int64 if member.rank else int
        grad = torch.randn(4096, generator=torch.Generator().manual_seed(member.rank))
        timeout = np.float32(20) if member.rank else 20
        options = {"piece_numel": whole(1024), "timeout": timeout}
        gck.all_reduce_(grad, gck.ErrorFeedback(), gck.Sign(whole(64)), member, **options)
        err, server = torch.zeros(4096), torch.zeros(2048)
        return gck.packed_all_reduce_(grad, err, server, whole(64), member)

    one, two = gck.SimulatedGroup(np.int64(2), timeout=np.float64(30)).run(rank_main)
    assert same_bytes(one, two)
    link = Link.ethernet(np.float64(1e8))
    assert choose_piece_numel(gck.Sign(), np.int64(1 << 22), np.int32(4), link=link) == choose_piece_numel(
        gck.Sign(), 1 << 22, 4, link=Link.ethernet(1e8)
    )


def test_options_of_the_hook() -> None:
    state = gck.ddp.HookState(gck.Sign(), warmup_steps=np.int64(3), bypass_numel=np.int32(9))
    assert (type(state.warmup_steps), type(state.bypass_numel)) == (int, int)


def test_checkpoints(tmp_path: Path) -> None:
    state = gck.ErrorFeedback()
    state.load_state_dict({"version": 1, "worker": torch.ones(8)})
    place = {"rank": np.int64(0), "world_size": np.int32(1)}
    given = {"step": np.int64(5), "keep": np.int64(2), "compressor": gck.Sign(np.int64(64))}
    gck.save_state(tmp_path, state, scale=np.float32(4), **given, **place)
    assert gck.saved_steps(tmp_path) == [5]
    loaded = gck.load_state(
        tmp_path, state, step=np.int64(5), scale=np.float64(8), compressor=gck.Sign(64), **place
    )
    assert loaded is not None
    assert (loaded.step, loaded.scale) == (5, 8.0)
    assert state.worker is not None
    assert torch.equal(state.worker, torch.full((8,), 2.0))
    state.rescale_(np.float16(0.5))
    assert torch.equal(state.worker, torch.ones(8))


@pytest.mark.parametrize("value", [np.bool_(True), True, np.array([5]), "5", torch.tensor(5), 5j])
def test_what_is_no_number_stays_what_it_is(value: Any) -> None:
    assert plain_int(value) is value
    assert plain_real(value) is value
    with pytest.raises(gck.errors.DtypeError, match="k must be an int, got "):
        gck.TopK(k=value)
    with pytest.raises(gck.errors.DtypeError, match="k must be an int, got "):
        gck.chunk_topk_ef_(torch.ones(64), torch.ones(64), 64, value)
    with pytest.raises(gck.errors.DtypeError, match="decay must be a number, got "):
        gck.Sign(decay=value)


def test_out_of_range_is_still_refused() -> None:
    with pytest.raises(gck.errors.ArgumentError, match="k must be at least 1, got 0"):
        gck.TopK(k=np.int64(0))
    with pytest.raises(gck.errors.ArgumentError, match=r"ratio must be in \(0, 1\], got nan"):
        gck.topk_ef_(torch.ones(9), torch.ones(9), np.float32("nan"))
    with pytest.raises(gck.errors.DtypeError, match=r"k must be an int, got .*2\.0.* \(float32\)"):
        gck.topk_ef_(torch.ones(9), torch.ones(9), k=np.float32(2))
    with pytest.raises(gck.errors.DtypeError, match="ratio must be a number, got Fraction"):
        gck.TopK(ratio=Fraction(10**400))
