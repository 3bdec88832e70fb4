"""A peer that computes something else is noticed before it is timed."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import gck
from bench import (
    bench_decode,
    bench_index_codecs,
    bench_messages,
    bench_quantize,
    bench_reduce,
    bench_sign,
    peers,
    peers_decode,
    peers_quantize,
)
from bench.measure import Buffers, Pool
from bench.places import places_of_seed
from bench.suite import HUGE, Case, Plan
from gck.kernels.random_k import reference


@pytest.fixture
def small_pool() -> Pool:
    return Pool(5_003, torch.float32, torch.device("cpu"), beyond_cache=False)


def test_verification_notices_wrong_sums(small_pool: Pool) -> None:
    bench_decode._verify(bench_decode._decompress, bench_decode._index_add_to_zeros, 3, 0.1, small_pool)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_decode._verify(bench_decode._decompress, bench_decode._index_add_, 3, 0.1, small_pool)


@pytest.mark.parametrize("name", bench_decode.SINGLE)
def test_verification_notices_wrong_decoding(
    name: str, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench_decode._decompress_one, bench_decode._unpack
    bench_decode._verify_one(*runs, name, small_pool)
    bench_decode._verify_one(
        bench_decode._decompress_add_one_, bench_decode._unpack_and_add_, name, small_pool
    )
    right = peers_decode.torch_decoded
    monkeypatch.setattr(peers_decode, "torch_decoded", lambda payload: right(payload).roll(1))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_decode._verify_one(*runs, name, small_pool)


def test_verification_notices_wrong_known_places(small_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "random 1%"
    bench_decode._verify_known(name, small_pool)
    right = bench_decode._index_copy
    monkeypatch.setattr(bench_decode, "_index_copy", lambda given: right(given).roll(1))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_decode._verify_known(name, small_pool)


@pytest.mark.parametrize("name", bench_messages.COMPRESSORS)
@pytest.mark.parametrize("peer", bench_messages.PEERS)
def test_verification_notices_wrong_sums_of_messages(
    peer: str, name: str, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_messages._verify(bench_messages.PEERS[peer], name, small_pool)
    right = bench_messages._where_they_lie
    monkeypatch.setattr(bench_messages, "_where_they_lie", lambda given: right(given).roll(1))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_messages._verify(bench_messages.PEERS[peer], name, small_pool)


@pytest.mark.parametrize("setting", bench_reduce.SETTINGS, ids=str)
def test_verification_notices_wrong_reductions(
    setting: bench_reduce.Setting, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = bench_reduce._composed_sum, bench_reduce._one_by_one
    bench_reduce._verify_steps(setting, small_pool)
    bench_reduce._verify_composed(setting, small_pool)
    for peer in sums:
        bench_reduce._verify_sum(peer, setting, small_pool)
    right, add = peers_decode.torch_decoded, gck.decompress_add_
    monkeypatch.setattr(peers_decode, "torch_decoded", lambda payload: right(payload) * 2)
    monkeypatch.setattr(gck, "decompress_add_", lambda out, payload: add(out, payload, 2.0))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_reduce._verify_composed(setting, small_pool)
    for peer in sums:
        with pytest.raises(peers.PeerMismatchError, match="disagree"):
            bench_reduce._verify_sum(peer, setting, small_pool)
    steps = bench_reduce._by_steps
    monkeypatch.setattr(bench_reduce, "_by_steps", lambda *given: steps(*given) ^ 1)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_reduce._verify_steps(setting, small_pool)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_reduction_has_a_peer(device: str) -> None:
    """Of every number of ranks; nothing is run."""
    made = bench_reduce.cases(Plan(torch.device(device)))
    ours = {(case.kernel, case.value) for case in made if case.verify is None}
    sums = {("decompress", str(s)) for s in bench_reduce.SETTINGS if s.compressor.decay == 1}
    assert ours == {("reduce_", str(s)) for s in bench_reduce.SETTINGS} | sums
    assert len(sums) < len(bench_reduce.SETTINGS)
    assert ours == {(case.kernel, case.value) for case in made if case.verify is not None}


@pytest.mark.parametrize(("bench", "value"), [(bench_sign, 256), (bench_quantize, "4")])
def test_one_setting_is_measured_of_100m_elements(bench: Any, value: object) -> None:
    """Of both dtypes, and its peer; nothing is run."""
    huge = [case for case in bench.cases(Plan(torch.device("cpu"))) if case.n == HUGE]
    assert {case.value for case in huge} == {value}
    assert [case.dtype for case in huge if case.verify is None] == [torch.float32, torch.bfloat16]
    assert len(huge) == 4
    on_a_gpu = {case.value for case in bench.cases(Plan(torch.device("cuda"))) if case.n == HUGE}
    assert len(on_a_gpu) > 1


@pytest.mark.parametrize("codec", bench_index_codecs.CODECS)
def test_verification_notices_wrong_indices(codec: str, small_pool: Pool) -> None:
    peer = partial(bench_index_codecs._torch_decode, codec)
    bench_index_codecs._verify(partial(bench_index_codecs._decode, codec), peer, codec, 50, small_pool)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        bench_index_codecs._verify(lambda given: (peer(given)[0] + 1,), peer, codec, 50, small_pool)


def _forgets_residual(buffers: Buffers, k: int) -> Any:
    values, indices = peers.torch_topk_ef_(buffers, k)
    buffers.err[indices] = values
    return values, indices


def _wrong_entries(buffers: Buffers, k: int) -> Any:
    acc = peers.accumulate_(buffers.grad, buffers.err)
    values = acc[:k].clone()
    acc[:k] = 0
    return values, torch.arange(k)


@pytest.mark.parametrize("peer", [_forgets_residual, _wrong_entries])
def test_verification_notices_a_wrong_topk(peer: Any, small_pool: Pool) -> None:
    peers.verify_topk(peers.torch_topk_ef_, small_pool, 50)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers.verify_topk(peer, small_pool, 50)


@pytest.mark.parametrize("chunk_size", [64, 4096])
@pytest.mark.parametrize("part", [0, 1])
def test_verification_notices_wrong_signs(
    chunk_size: int, part: int, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.verify_sign(small_pool, chunk_size)
    right = peers.sign_ef_peer_

    def wrong(buffers: Buffers, *rest: Any) -> Any:
        result = right(buffers, *rest)
        result[part][-1] += 1
        return result

    monkeypatch.setattr(peers, "sign_ef_peer_", wrong)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers.verify_sign(small_pool, chunk_size)


@pytest.mark.parametrize("part", [0, 1])
def test_verification_notices_a_wrong_chunk_topk(
    part: int, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"chunk_size": 256, "k": 9}
    for bits in (32, 16):
        peers.verify_chunk_topk(small_pool, **options, value_bits=bits)
    peers.verify_torch_chunk_topk(small_pool, **options)
    right = peers.torch_chunk_topk_ef_

    def wrong(buffers: Buffers, *rest: Any) -> Any:
        result = right(buffers, *rest)
        result[part][-1] -= 1
        return result

    monkeypatch.setattr(peers, "torch_chunk_topk_ef_", wrong)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers.verify_chunk_topk(small_pool, **options, value_bits=32)
    monkeypatch.setattr(peers, "torch_chunk_topk", lambda magnitude, size, k: magnitude[: 4 * k].view(4, k))
    with pytest.raises(peers.PeerMismatchError, match=r"torch\.topk and gck disagree"):
        peers.verify_torch_chunk_topk(small_pool, **options)


VERIFIED = {
    **{f"{bits}": partial(peers_quantize.verify_quantize, bits=bits, chunk_size=64) for bits in (8, 4, 2)},
    **{
        f"{bits}, stochastic": partial(peers_quantize.verify_stochastic, bits=bits, chunk_size=64)
        for bits in (8, 4, 2)
    },
    "2, mean": partial(peers_quantize.verify_means, chunk_size=64),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", VERIFIED)
def test_verification_notices_wrong_codes(
    name: str, part: int, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = VERIFIED[name]
    verify(small_pool)
    peer = "torch_means_ef_" if "mean" in name else "torch_quantize_ef_"
    right = getattr(peers_quantize, peer)

    def wrong(*given: Any, **options: Any) -> Any:
        result = right(*given, **options)
        result[part][-1] += 1
        return result

    monkeypatch.setattr(peers_quantize, peer, wrong)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        verify(small_pool)


def test_verification_notices_a_bias(small_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.45))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers_quantize.verify_stochastic(small_pool, 4, 64)


def test_verification_notices_wrong_channels(small_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    peers_quantize.verify_quantize_per_channel(small_pool, 64)
    right = peers_quantize.torch_quantize_per_channel
    monkeypatch.setattr(peers_quantize, "torch_quantize_per_channel", lambda rows: right(rows.roll(1)))
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers_quantize.verify_quantize_per_channel(small_pool, 64)


@pytest.mark.parametrize("name", bench_quantize.SETTINGS)
def test_every_setting_of_quantize_has_a_peer_that_is_verified(name: str) -> None:
    pool = Pool(5_003, torch.bfloat16, torch.device("cpu"), beyond_cache=False)
    make = partial(Case, "quantize_ef_", "bits", name, pool.n, pool.dtype)
    case = bench_quantize.composition(make, bench_quantize.SETTINGS[name])
    assert case.verify is not None
    case.verify(pool)
    case.run(case.prepare(pool.take()))


@pytest.mark.parametrize("part", [0, 1])
def test_verification_notices_wrong_places(
    part: int, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in (peers.random_places, peers.places_of_strata):
        peers.verify_random_k(draw, small_pool, 50)
    right = peers.torch_random_k_ef_

    def wrong(buffers: Buffers, *rest: Any) -> Any:
        result = right(buffers, *rest)
        result[part][-1] -= 1
        return result

    monkeypatch.setattr(peers, "torch_random_k_ef_", wrong)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers.verify_random_k(peers.random_places, small_pool, 50)


@pytest.mark.parametrize("taken_before", range(5))
def test_pool_hands_out_fresh_residuals(taken_before: int, small_pool: Pool) -> None:
    for _ in range(taken_before):
        small_pool.take().err.zero_()
    peers.verify_topk(peers.torch_topk_ef_, small_pool, 50)  # writes two residuals at once
    seen = set()
    for _ in range(12):
        buffers = small_pool.take()
        assert torch.equal(buffers.err, small_pool.saved)
        buffers.err.zero_()
        seen.add(buffers.err.data_ptr())
    assert len(seen) == 5


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (1_000, 3), (4_097, 411)])
def test_places_of_a_seed_are_those_of_the_oracle(seed: int, n: int, k: int) -> None:
    places = places_of_seed(seed, n, k, torch.device("cpu"))
    assert places.tolist() == reference.indices(seed, n, k)


@pytest.mark.parametrize("n", [0, 1, 8, 4097])
def test_all_packing_is_that_of_numpy(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "cupy", np)  # whose names CuPy's are
    positive = torch.arange(n) % 3 == 1
    packed = np.packbits(positive.numpy(), bitorder="little").tolist()
    for pack in (peers.pack_with_torch, peers.pack_with_numpy, peers.pack_with_cupy):
        assert pack(positive).tolist() == packed


def test_signs_are_packed_by_cupy_where_it_is(small_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "cupy", np)
    peers.verify_sign(small_pool, 256, peers.pack_with_cupy)
    with pytest.raises(peers.PeerMismatchError, match="disagree"):
        peers.verify_sign(small_pool, 256, lambda positive: peers.pack_with_cupy(~positive))
    for found in (True, False):
        monkeypatch.setattr(peers, "have_cupy", lambda found=found: found)
        names = {case.implementation for case in bench_sign.cases(Plan(torch.device("cuda")))}
        assert ("torch + cupy.packbits" in names) == found
        names = {case.implementation for case in bench_sign.cases(Plan(torch.device("cpu")))}
        assert names == {"gck", "torch + packbits"}
