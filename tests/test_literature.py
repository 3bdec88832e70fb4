"""What the papers prove of compressors with error feedback, checked on gck's.

EF-signSGD: Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes" (ICML 2019). Top-k: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory"
(NeurIPS 2018), Lemma A.1. Low rank: Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient
Compression for Distributed Optimization" (NeurIPS 2019), Algorithm 1. Norms are taken in double precision,
so that what a bound allows for rounding is what fp32 arithmetic in the compressor can do, and is derived
where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gck

U = 2.0**-24  # the relative error of one rounding to fp32
STEPS = 10_000

FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussian": lambda n, g: torch.randn(n, generator=g),
    "cauchy": lambda n, g: torch.empty(n).cauchy_(generator=g),
    "sparse": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.02),
    "constant": lambda n, g: torch.full((n,), 0.1),
    "one large": lambda n, g: torch.zeros(n).index_fill_(0, torch.tensor([n // 3]), 1e6).add_(1e-3),
}

vectors = st.builds(
    lambda family, n, seed: FAMILIES[family](n, torch.Generator().manual_seed(seed)),
    st.sampled_from(sorted(FAMILIES)),
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
)


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def chunks_of(x: Tensor, size: int) -> list[Tensor]:
    return list(x.split(size))


@given(vectors, st.sampled_from([32, 64, 256, 1024]))
def test_sign_is_as_near_as_the_density_says(v: Tensor, chunk_size: int) -> None:
    """Lemma 8 of EF-signSGD, chunk by chunk: |C(v) - v|^2 <= (1 - phi(v)) |v|^2, phi = |v|_1^2 / (d |v|_2^2).

    With the exact mean m = |v|_1 / d, |v - m sign(v)|^2 = |v|^2 - d m^2: equality. A scale m (1 + e) adds
    d (m e)^2, where e is made by the log2(chunk) additions of the tree and one division.
    """
    decoded = gck.decompress(gck.sign_ef_(v, torch.zeros_like(v), chunk_size=chunk_size))
    e = (math.log2(chunk_size) + 1.5) * U
    for x, y in zip(chunks_of(v, chunk_size), chunks_of(decoded, chunk_size), strict=True):
        explained = float(x.double().abs().sum()) ** 2 / x.numel()  # phi(v) |v|^2 = d m^2
        allowed = square(x) - explained + e * e * explained
        # Doubles: sums of d terms, and a difference of numbers that may be almost equal.
        assert square(x - y.double()) <= allowed + 1e-12 * square(x)


@given(vectors, st.floats(0.001, 1))
def test_top_k_is_a_contraction(v: Tensor, ratio: float) -> None:
    """Lemma A.1 of Sparsified SGD: |C(v) - v|^2 <= (1 - k/d) |v|^2. Values travel exactly, so no slack."""
    payload = gck.topk(v, ratio)
    residual = square(v - gck.decompress(payload))
    assert residual <= (1 - payload.values.numel() / v.numel()) * square(v) * (1 + 1e-12)


@given(vectors, st.sampled_from([(32, 1), (64, 8), (256, 128)]))
def test_chunk_top_k_is_a_contraction_in_every_chunk(v: Tensor, shape: tuple[int, int]) -> None:
    chunk_size, k = shape
    payload = gck.chunk_topk_ef_(v, torch.zeros_like(v), chunk_size=chunk_size, k=k, value_bits=32)
    decoded = gck.decompress(payload)
    for x, y in zip(chunks_of(v, chunk_size), chunks_of(decoded, chunk_size), strict=True):
        assert square(x - y) <= (1 - min(1, k / x.numel())) * square(x) * (1 + 1e-12)


@given(vectors, st.sampled_from([8, 4, 2]), st.sampled_from([32, 256]))
def test_the_nearest_code_is_no_farther_than_zero(v: Tensor, bits: int, chunk_size: int) -> None:
    """Element by element |C(v) - v| <= |v|: what lies between 0 and a step goes to the nearer one. At the
    middle the quotient (two roundings), the scale (one) and err itself (two) may be off by U of v each."""
    err = torch.zeros_like(v)
    gck.quantize_ef_(v, err, bits=bits, chunk_size=chunk_size)
    assert bool((err.double().abs() <= v.double().abs() * (1 + 16 * U)).all())


@pytest.mark.parametrize("f", [0.125, 0.3, 0.875])
@pytest.mark.parametrize(("bits", "chunk_size"), [(8, 32), (8, 8192), (4, 32), (4, 128)])
def test_random_codes_are_no_farther_than_zero_on_average(bits: int, chunk_size: int, f: float) -> None:
    """E|C(v) - v|^2 <= sqrt(n) / (2 q) |v|^2 of a chunk of n with codes up to q.

    A fraction f of a step s adds f (1 - f) s^2; one element of the chunk is q steps. The quotient of
    m f (1 - f) and q^2 + m f^2 is at most that of m f and it, which is largest at f = q / sqrt(m). Of T seeds
    each element adds f^2 or (1 - f)^2, each for itself: the mean is off by `slack` once in 10^9 at most
    (Hoeffding).
    """
    q, trials = 2 ** (bits - 1) - 1, 400
    v = torch.full((chunk_size,), f)
    v[chunk_size // 3] = q
    squares = []
    for seed in range(trials):
        err = torch.zeros_like(v)
        gck.quantize_ef_(v, err, bits=bits, chunk_size=chunk_size, rounding="stochastic", seed=seed)
        squares.append(square(err))
    mean = sum(squares) / trials
    slack = abs(1 - 2 * f) * math.sqrt(chunk_size * math.log(2e9) / (2 * trials)) + 1e-4 * chunk_size
    assert abs(mean - (chunk_size - 1) * f * (1 - f)) < slack
    assert (chunk_size - 1) * f * (1 - f) <= math.sqrt(chunk_size) / (2 * q) * square(v) < square(v)


@pytest.mark.parametrize(("rounding", "least", "most"), [("nearest", 1.0, 1.6), ("stochastic", 4.0, 9.0)])
def test_residuals_of_two_bits(rounding: str, least: float, most: float) -> None:
    """In gradients: what docs/kernels/quantize.md says of chunks of 256."""
    generator, err = torch.Generator().manual_seed(1), torch.zeros(8192)
    for seed in range(300):
        grad = torch.randn(8192, generator=generator)
        gck.quantize_ef_(grad, err, bits=2, chunk_size=256, rounding=rounding, seed=seed)
    assert least < float(err.norm() / grad.norm()) < most


def rounded(payload: gck.LowRankFactors) -> float:
    """What all roundings behind `left` may add to the residual, in norms of the matrix M.

    An entry of right is a sum of rows, 256 after another and then those sums: with p roundings, it is off by
    p U |l| |m| at most, of a column m of M and a row l of left; all of right by sqrt(rank) p U |M|. An entry
    of the product is off by (rank + 1) U |l'| |r| of columns of left and right, all of it by sqrt(rank)
    (rank + 1) U |M|. One more for err. Twice that is more than what is of second order.
    """
    rank, rows = payload.left.shape
    p = min(rows, 256) + -(-rows // 256) + 1
    return 2 * (math.sqrt(rank) * (p + rank + 1) + 1) * U


def kept(payload: gck.LowRankFactors) -> tuple[Tensor, float]:
    """The rows of left that are not zeros, in fp64, and how far they are from orthonormal: |L L^T - I|."""
    left = payload.left.double()
    left = left[left.abs().amax(1) > 0]
    apart = left @ left.T - torch.eye(len(left))
    return left, float(torch.linalg.matrix_norm(apart, 2)) if len(left) else 0.0


shapes = st.tuples(st.sampled_from([1, 2, 4, 8, 64]), st.sampled_from([None, 1, 17, 64, 500]))


@settings(deadline=None, derandomize=True)
@given(vectors, shapes, st.integers(-(2**63), 2**63 - 1))
def test_low_rank_leaves_no_more_than_there_was(v: Tensor, shape: tuple[int, int | None], seed: int) -> None:
    """|C(v) - v| <= |v|: (I - L^T L) M, of norm |M| at most wherever |L L^T - I| <= 1; and roundings."""
    err = torch.zeros_like(v)
    payload = gck.low_rank_ef_(v, err, shape[0], columns=shape[1], seed=seed)
    assert kept(payload)[1] < 1
    assert math.sqrt(square(err)) <= (1 + rounded(payload)) * math.sqrt(square(v))


@settings(deadline=None, derandomize=True)
@given(vectors, shapes, st.integers(-(2**63), 2**63 - 1))
def test_low_rank_sends_the_projection(v: Tensor, shape: tuple[int, int | None], seed: int) -> None:
    """What is left is orthogonal to left, whose rows are orthonormal. What is decoded is in their span.

    With rows of left that come from a matrix Y (m, n), their lengths 1, of condition K, in fp64 with unit
    u = 2^-53, |L L^T - I| <= 5 K^2 (m n + n (n + 1)) u (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya,
    "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015). K is about 1 the second time,
    below 2 wherever the first one leaves |L L^T - I| <= 1/2. Rounding to fp32 moves a row by U at most, all
    of L by sqrt(n) U. Of E = M - L^T R with R = L M, L E is (I - L L^T) R, and at most as much of |M|.
    """
    err = torch.zeros_like(v)
    payload = gck.low_rank_ef_(v, err, shape[0], columns=shape[1], seed=seed)
    left, apart = kept(payload)
    n, m = len(left), payload.left.shape[1]
    assert apart <= 5 * 2**2 * (m * n + n * (n + 1)) * 2.0**-53 + 2.1 * math.sqrt(n) * U
    product = payload.left.double().T @ payload.right.double()
    behind = -product.view(-1)[len(v) :]  # the end of the last row, of which err says nothing
    remains = left @ torch.cat([err.double(), behind]).view(m, -1)
    assert math.sqrt(square(remains)) <= (1.01 * apart + rounded(payload)) * math.sqrt(square(v))


@pytest.mark.parametrize("rank", [3, 4, 8, 64])
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (3, 500), (700, 3), (300, 200)])
def test_a_matrix_of_low_rank_is_sent_whole(rows: int, columns: int, rank: int) -> None:
    """M of rank 3, all of it exact. Y = M basis^T is made with errors D, each a sum of q roundings. Then
    M = Y C, C = Y^+ M, and the part of M that is orthogonal to the span of Y + D is one of -D C."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        factors = [
            torch.randint(-50, 51, shape, generator=generator).float() for shape in ((rows, 3), (3, columns))
        ]
        matrix = factors[0] @ factors[1]  # integers below 2^24
        err = torch.zeros_like(matrix)
        payload = gck.low_rank_ef_(matrix, err, rank, seed=seed)
        left, apart = kept(payload)
        assert len(left) >= 3  # others are roundings of these, or zeros
        basis = gck.LowRank(rank, columns, seed).basis(matrix.numel(), matrix.device)[:3].double()
        exact = matrix.double()
        q = -(-columns // 64) + 6 + 1
        errors = 1.01 * q * U * math.sqrt(square(exact.abs() @ basis.abs().T))
        amplified = float(torch.linalg.matrix_norm(torch.linalg.pinv(exact @ basis.T) @ exact, 2))
        norm = math.sqrt(square(matrix))
        allowed = errors * amplified + (1.01 * apart + rounded(payload)) * norm
        assert math.sqrt(square(err)) <= allowed < 0.001 * norm


def bounded(delta: float) -> float:
    """The largest |err| / max |grad| that a delta-contraction allows.

    Lemma 3 of EF-signSGD bounds E|err|^2 by 4 (1 - delta) / delta^2 times that of a gradient. Its proof, for
    every sequence of gradients: |err'| <= q (|err| + |grad|) with q = sqrt(1 - delta), so that |err| never
    exceeds q / (1 - q) max |grad|; and q / (1 - q) <= 2 q / delta, which is the Lemma's.
    """
    q = math.sqrt(1 - delta)
    return q / (1 - q)


@pytest.mark.parametrize("family", ["gaussian", "cauchy", "sparse"])
@pytest.mark.parametrize("compressor", ["topk", "chunk_topk", "sign"])
def test_the_residual_stays_bounded(compressor: str, family: str) -> None:
    """Lemma 3 of EF-signSGD over many steps, step by step; for sign with the least density met so far."""
    n, chunk_size = 256, 64
    generator = torch.Generator().manual_seed(5)
    err = torch.zeros(n)
    largest, delta, reached = 0.0, 1.0, 0.0
    for _ in range(STEPS):
        grad = FAMILIES[family](n, generator)
        if compressor == "topk":
            delta = 4 / n
            gck.topk_ef_(grad, err, k=4)
        elif compressor == "chunk_topk":
            delta = 4 / chunk_size
            gck.chunk_topk_ef_(grad, err, chunk_size=chunk_size, k=4, value_bits=32)
        else:
            acc = (grad + err).double().view(-1, chunk_size)
            norm = acc.square().sum(1)
            density = acc.abs().sum(1).square() / (chunk_size * norm)
            # Chunks of zeros are sent exactly, whatever the density of nothing may be.
            delta = min([delta, *density[norm > 0].tolist()])
            gck.sign_ef_(grad, err, chunk_size=chunk_size)
        largest = max(largest, math.sqrt(square(grad)))
        norm_err = math.sqrt(square(err))
        reached = max(reached, norm_err)
        # Every step rounds acc and err once each, which q < 1 keeps from piling up beyond 1 / (1 - q) times.
        assert norm_err <= bounded(delta) * largest * (1 + 4 * U / (1 - math.sqrt(1 - delta)))
    assert reached > 0


def stochastic(grad: Tensor, err: Tensor, bits: int, seed: int) -> Any:
    return gck.quantize_ef_(grad, err, bits=bits, chunk_size=64, rounding="stochastic", seed=seed)


@pytest.mark.parametrize("family", ["gaussian", "cauchy"])
@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("8 bits", lambda g, e, t: gck.quantize_ef_(g, e, bits=8, chunk_size=64)),
        ("8 bits, stochastic", lambda g, e, t: stochastic(g, e, 8, t)),
        ("4 bits, stochastic", lambda g, e, t: stochastic(g, e, 4, t)),
        ("2 bits, stochastic", lambda g, e, t: stochastic(g, e, 2, t)),
        ("2 bits, means", lambda g, e, t: gck.quantize_ef_(g, e, bits=2, chunk_size=64, scale="mean")),
        ("sign", lambda g, e, t: gck.sign_ef_(g, e, chunk_size=64)),
        ("top-k", lambda g, e, t: gck.topk_ef_(g, e, 0.05)),
        ("low rank", lambda g, e, t: gck.low_rank_ef_(g, e, 2, seed=t)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_lost(name: str, compress: Callable[[Tensor, Tensor, int], Any], family: str) -> None:
    """sum decoded + err = sum grad, to the roundings of acc = grad + err and of err = acc - decoded.

    Each is off by at most U times its result, so the two sides differ by at most U sum (|acc| + |err|) in
    every element; a compressor that decodes otherwise than it subtracts is off by whole codes.
    """
    n = 1000
    generator = torch.Generator().manual_seed(11)
    err = torch.zeros(n)
    given_, sent, slack = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for step in range(300):
        grad = FAMILIES[family](n, generator)
        acc = grad + err
        sent += gck.decompress(compress(grad, err, step))
        given_ += grad
        # The sums of doubles round, too.
        slack += U * (acc.abs() + err.abs()) + 2.0**-53 * (given_.abs() + sent.abs())
    assert bool(((sent + err - given_).abs() <= slack).all())
    assert float(sent.abs().sum()) > 0
