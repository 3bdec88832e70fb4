"""A threshold guessed from a sample: low enough for k winners very probably, and for few others.

The sample is made of lines, runs of 16 elements at hashed places, so that no period of a gradient aligns
with them, and at most one element in 64. The guess is the sample's key of rank
f + 5 sqrt(sum of squared hits a line) + 8, where f is the expected rank of the k-th key and a hit a key of
at least that rank: the squares measure how clustered the large elements are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, MAGNITUDE, accumulate, magnitude_key
from gck.kernels.common.residual import read_residual
from gck.kernels.topk.gpu_control import EXPECTED, GUESS, TIE

LINE = 16  # elements of a line: one cache line of fp32
SAMPLE_FRACTION = 64  # at most one element in this many is sampled
MAX_LINES = 4096
MIN_SAMPLED = 1 << 16  # below this many elements, reading err again costs as little as a sample
BLOCK_LINES = 64  # lines a program of the sample
# The sample's histogram: keys without their lowest bits, so with 5 bits of mantissa.
BIN_SHIFT = 18
SAMPLE_BINS = 1 << (31 - BIN_SHIFT)
HINT_SLACK = tl.constexpr(0.97)  # of the last threshold, so that this step's is probably above
GUESS_BLOCK = 256  # lines that the one guessing program looks at together
LARGEST_ROOT = tl.constexpr(1024)  # of the sum of squared hits; a power of two
HALVINGS = tl.constexpr(LARGEST_ROOT.value.bit_length())


def listing(n: int, k: int) -> bool:
    """Whether a threshold is guessed at all for k of n elements."""
    return n >= MIN_SAMPLED and k <= n // 4


def sample_lines(n: int, most: int = MAX_LINES) -> int:
    return min(most, n // (LINE * SAMPLE_FRACTION))


def sample_blocks(lines: int) -> int:
    """Programs of the sample: the guess reads whole blocks of lines, of which some may hold nothing."""
    return -(-lines // GUESS_BLOCK) * (GUESS_BLOCK // BLOCK_LINES)


def list_capacity(n: int, k: int, lines: int, part: int | None = None) -> int:
    """Twice k at least. Else what reaches the guess by a sample of so many lines at the worst, where all hits
    of a line come together; or by a `part` of them alone, where they do not. Of a guess of rank R, the number
    of elements is that of R sampled ones, and five standard deviations."""

    def reached(lines: int, together: int) -> float:
        each = n / (lines * LINE)
        rank = k / each + 5 * (together * k / each) ** 0.5 + 8
        return float(each * (rank + 5 * (together * rank) ** 0.5))

    most = max(2 * k, reached(lines, LINE), reached(min(part or lines, lines), 1))
    return min(n, int(most) + (1 << 14))


@triton.jit
def hash_line(b_line):
    """A well-mixed uint32 of each number (the finaliser of MurmurHash3)."""
    b_hash = b_line.to(tl.uint32) + 0x9E3779B9
    b_hash = (b_hash ^ (b_hash >> 16)) * 0x85EBCA6B
    b_hash = (b_hash ^ (b_hash >> 13)) * 0xC2B2AE35
    return b_hash ^ (b_hash >> 16)


@triton.jit
def place_of_line(b_line, stride):
    """Where the sample's lines lie, in lines: a hashed place in each stratum of `stride` lines."""
    b_jitter = hash_line(b_line) % tl.cast(stride, tl.uint32)
    return b_line.to(tl.int64) * stride + b_jitter.to(tl.int64)


@triton.jit
def hinted(p_hint, HINT: tl.constexpr):
    """The last step's threshold, or 0: there is none."""
    if HINT:
        return tl.load(p_hint)
    else:
        return tl.cast(0, tl.int32)


@triton.jit
def sample_block(
    p_grads,
    p_errs,
    b_length,
    p_keys,
    p_bins,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    SHIFT: tl.constexpr,
    decay,
    p_clip,
    RESIDUAL: tl.constexpr,
):
    """Keys and histogram of a block of lines, given by their addresses and their numbers of elements; a
    negative number leaves a line to another launch."""
    b_element = tl.arange(0, LINE)
    b_inside = b_element[None, :] < b_length[:, None]
    b_grad = tl.load(p_grads[:, None] + b_element[None, :], mask=b_inside, other=0.0)
    b_err = tl.load(p_errs[:, None] + b_element[None, :], mask=b_inside, other=0.0)
    b_err = read_residual(b_err, decay, p_clip, RESIDUAL)
    b_key = tl.where(b_inside, magnitude_key(accumulate(b_grad, b_err)), -1)
    b_at = tl.arange(0, BLOCK)[:, None] * LINE + b_element[None, :]
    tl.store(p_keys + b_at, b_key, mask=(b_length >= 0)[:, None])
    # Many equal keys are most often the smallest, as zeros are. One addition for all of them spares
    # as many that would wait for each other.
    b_bin = b_key >> SHIFT
    smallest = tl.min(tl.min(tl.where(b_inside, b_bin, MAGNITUDE >> SHIFT), 1), 0)
    b_smallest = b_inside & (b_bin == smallest)
    count = tl.sum(tl.sum(b_smallest.to(tl.int32), 1), 0)
    if count > 0:
        tl.atomic_add(p_bins + smallest, count, sem="relaxed")
    b_other = b_inside & (b_bin != smallest)
    tl.atomic_add(p_bins + b_bin, tl.full(b_key.shape, 1, tl.int32), mask=b_other, sem="relaxed")


@triton.jit
def margin_of(squares):
    """Ranks between the expected one and the guess, for a sum of squared hits."""
    root = tl.cast(0, tl.int32)
    for bit in range(HALVINGS):
        larger = root + (LARGEST_ROOT >> bit)
        if larger * larger <= squares:
            root = larger
    return 5 * (root + 1) + 8


@triton.jit
def _sampled_at_least(p_keys, lines, key, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """(keys of the sample from `key` on, their squared numbers a line, summed); whole blocks of lines.

    In floating point, which is exact for numbers as small, because some versions add up comparisons by
    way of local memory.
    """
    b_hits = tl.zeros((BLOCK,), tl.float32)
    b_squares = tl.zeros((BLOCK,), tl.float32)
    b_element = tl.arange(0, LINE)
    for first in range(0, lines, BLOCK):
        b_line = first + tl.arange(0, BLOCK)
        b_at = b_line[:, None] * LINE + b_element[None, :]
        b_key = tl.load(p_keys + b_at)
        b_hit = tl.sum(tl.where(b_key >= key, 1.0, 0.0), 1)
        b_hits += b_hit
        b_squares += b_hit * b_hit
    return tl.sum(b_hits, 0).to(tl.int32), tl.sum(b_squares, 0).to(tl.int32)


@triton.jit
def _bin_of(b_at_least, rank):
    """The last bin from which on there are `rank` keys."""
    return tl.sum((b_at_least >= rank).to(tl.int32), 0) - 1


@triton.jit
def _exact_key(p_keys, lines, key, rank, SHIFT: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """The sample's key of that rank, which `key` is but for its lowest bits."""
    for bit in range(SHIFT):
        candidate = key | (1 << (SHIFT - 1 - bit))
        reached, _squares = _sampled_at_least(p_keys, lines, candidate, BLOCK, LINE)
        if reached >= rank:
            key = candidate
    return key


@triton.jit
def _guessed_rank(p_keys, lines, middle, expected, sampled, BLOCK: tl.constexpr, LINE: tl.constexpr):
    _hits, squares = _sampled_at_least(p_keys, lines, middle, BLOCK, LINE)
    return tl.minimum(expected + margin_of(squares), sampled)


@triton.jit
def guess_by_sample(
    p_control,
    p_keys,
    p_bins,
    lines,
    n,
    density,
    capacity,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    b_bin = tl.arange(0, BINS)
    b_at_least = tl.cumsum(tl.load(p_bins + b_bin), 0, reverse=True)
    sampled = tl.max(b_at_least, 0)
    expected = (density * sampled.to(tl.float32)).to(tl.int32) + 1
    middle = _bin_of(b_at_least, expected) << SHIFT
    rank = _guessed_rank(p_keys, lines, middle, expected, sampled, BLOCK, LINE)
    bin = _bin_of(b_at_least, rank)
    guess = bin << SHIFT
    count = tl.sum(tl.where(b_bin == bin, b_at_least, 0), 0)
    tie = tl.cast(0, tl.int32)
    # With so many keys the list would overflow: the bins are too wide, or one key is very common. Then
    # the exact keys are worth their time, and where the ties are the many, what is above them is listed.
    room = tl.cast(capacity, tl.int64) * sampled
    if count.to(tl.int64) * n > room:
        middle = _exact_key(p_keys, lines, middle, expected, SHIFT, BLOCK, LINE)
        rank = _guessed_rank(p_keys, lines, middle, expected, sampled, BLOCK, LINE)
        guess = _exact_key(p_keys, lines, _bin_of(b_at_least, rank) << SHIFT, rank, SHIFT, BLOCK, LINE)
        count, _squares = _sampled_at_least(p_keys, lines, guess, BLOCK, LINE)
        # Infinities must be listed, for what is not stays in err.
        if (count.to(tl.int64) * n > room) & (guess < INFINITY):
            guess += 1
            tie = guess
    if guess == 0:  # zeros are never listed
        guess += 1
        tie = guess
    guess = tl.minimum(guess, INFINITY)
    expected = tl.minimum(tl.maximum(guess, middle + (1 << SHIFT) // 2), INFINITY)
    tl.store(p_control + GUESS, guess.to(tl.int64))
    tl.store(p_control + EXPECTED, expected.to(tl.int64))
    tl.store(p_control + TIE, tie.to(tl.int64))
