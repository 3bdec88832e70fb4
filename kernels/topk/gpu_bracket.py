"""Where the key of the k-th largest element probably lies, from a sample that one program holds.

The sample is made of lines, runs of 16 elements at hashed places, so that no period of a gradient aligns with
them. The bracket begins at the guess, the sample's key of rank f + 5 sqrt(sum of squared hits a line) + 8,
where f is the expected rank of the k-th key and a hit a key of at least that rank: the squares measure how
clustered the large elements are. It ends 3 sqrt(...) ranks on the other side, or later, where the bits that
its keys differ in reach further. To miss the k-th key there costs some levels of the search, which is rare.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, accumulate, magnitude_key
from gck.kernels.common.residual import read_residual
from gck.kernels.topk.gpu_control import (
    BRACKET_BITS,
    BRACKET_STOP,
    EXPECTED,
    GUESS,
    TIE,
)
from gck.kernels.topk.gpu_guess import HINT_SLACK, hinted, margin_of, place_of_line

LINES = 1024  # that the program has room for; a power of two
BRACKET_WARPS = 16
BRACKET_REGISTERS = 96
ZEROED = tl.constexpr(2048)  # words of the control block at a time
OCTAVE = tl.constexpr(1 << 23)  # of keys: from x to 2x
MIDDLE_BITS = tl.constexpr(18)  # that the expected key may lack: what follows only counts from there on
MIDDLE_WIDTH = tl.constexpr(1 << MIDDLE_BITS.value)
GUESS_BITS = tl.constexpr(15)  # that the guess may lack: 1/256 octave
GUESS_WIDTH = tl.constexpr(1 << GUESS_BITS.value)
SURE = tl.constexpr(12)  # ranks: that fewer are found than one in so many expected hardly happens


@triton.jit
def _reach(b_key, key):
    """How many keys of the sample are at least `key`."""
    return tl.sum(tl.where(b_key >= key, 1, 0))  # over both axes at once: each thread first adds up its own


@triton.jit
def _reach_both(b_key, key, other_key):
    """How many keys are at least `key`, and at least `other_key`, in one sum: both are below 32768."""
    both = tl.sum(tl.where(b_key >= key, 1, 0) + tl.where(b_key >= other_key, 65536, 0))
    return both & 0xFFFF, both >> 16


@triton.jit
def _key_of_rank(b_key, rank, low, high, BITS: tl.constexpr):
    """The largest key that `rank` keys reach, without its BITS lowest bits; `rank` of them reach `low`, and
    fewer `high`."""
    low >>= BITS
    high = ((high - 1) >> BITS) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if _reach(b_key, middle << BITS) >= rank:
            low = middle
        else:
            high = middle
    return low << BITS


@triton.jit
def _keys_of_ranks(b_key, rank, low, high, other_rank, other_low, other_high, BITS: tl.constexpr):
    """`_key_of_rank` of two ranks, side by side: a step of the one does not wait for the other's."""
    low >>= BITS
    high = ((high - 1) >> BITS) + 1
    other_low >>= BITS
    other_high = ((other_high - 1) >> BITS) + 1
    while tl.maximum(high - low, other_high - other_low) > 1:
        middle = low + (high - low) // 2
        other_middle = other_low + (other_high - other_low) // 2
        reach, other_reach = _reach_both(b_key, middle << BITS, other_middle << BITS)
        up, other_up = reach >= rank, other_reach >= other_rank
        # What has closed stays: its middle is its low end, which enough keys reach.
        low, high = tl.where(up, middle, low), tl.where(up, high, middle)
        other_low = tl.where(other_up, other_middle, other_low)
        other_high = tl.where(other_up, other_high, other_middle)
    return low << BITS, other_low << BITS


@triton.jit
def _from(b_key, rank, near):
    """`near` if that many keys reach it, else 0: where to look for the key of that rank from."""
    near = tl.maximum(near, 0)
    return tl.where(_reach(b_key, near) >= rank, near, 0)


@triton.jit
def _margin(b_key, middle):
    b_hits = tl.sum(tl.where(b_key >= middle, 1.0, 0.0), 1)
    return margin_of(tl.sum(b_hits * b_hits, 0).to(tl.int32))


@triton.jit
def _clear(p_control, words):
    for first in range(0, words, ZEROED):
        b_word = first + tl.arange(0, ZEROED)
        tl.store(p_control + b_word, tl.zeros((ZEROED,), tl.int64), mask=b_word < words)
    tl.debug_barrier()  # some of them are stored again


@triton.jit
def _store(p_control, guess, expected, tie, stop):
    stop = tl.minimum(tl.maximum(stop, guess + 1), INFINITY)
    bits = tl.cast(0, tl.int32)
    while (stop - guess - 1) >> bits > 0:
        bits += 1
    stop = tl.minimum(guess + (tl.cast(1, tl.int64) << bits), INFINITY)  # what so many bits reach anyway
    tl.store(p_control + GUESS, tl.minimum(guess, INFINITY).to(tl.int64))
    tl.store(p_control + EXPECTED, tl.minimum(tl.maximum(guess, expected), INFINITY).to(tl.int64))
    tl.store(p_control + TIE, tie.to(tl.int64))
    tl.store(p_control + BRACKET_STOP, stop.to(tl.int64))
    tl.store(p_control + BRACKET_BITS, bits.to(tl.int64))


@triton.jit
def bracket_by_sample(
    p_grad,
    p_err,
    p_control,
    n,
    lines,
    stride,
    density,
    capacity,
    decay,
    p_clip,
    words,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    b_line = tl.arange(0, LINES)
    b_at = (place_of_line(b_line, stride) * LINE)[:, None] + tl.arange(0, LINE)[None, :]
    b_inside = (b_line < lines)[:, None]
    b_grad = tl.load(p_grad + b_at, mask=b_inside, other=0.0)
    b_err = read_residual(tl.load(p_err + b_at, mask=b_inside, other=0.0), decay, p_clip, RESIDUAL)
    _clear(p_control, words)  # while the sample is on its way
    b_key = tl.where(b_inside, magnitude_key(accumulate(b_grad, b_err)), -1)

    sampled = lines * LINE
    expected = (density * sampled.to(tl.float32)).to(tl.int32) + 1
    stop = tl.max(tl.max(b_key, 1), 0) + 1
    low = _from(b_key, expected, stop - 8 * OCTAVE)
    middle = _key_of_rank(b_key, expected, low, stop, MIDDLE_BITS)
    margin = _margin(b_key, middle)
    rank = tl.minimum(expected + margin, sampled)
    low = _from(b_key, rank, middle - OCTAVE // 4)
    # Of few expected keys none is surely among the winners: the bracket ends after the sample's largest.
    upper = (margin - 8) // 5 * 3
    last = tl.where(expected > upper, expected - upper, 1)
    guess, last_key = _keys_of_ranks(b_key, rank, low, middle + MIDDLE_WIDTH, last, middle, stop, GUESS_BITS)
    if expected > upper:
        stop = last_key + GUESS_WIDTH
    elif expected < SURE:
        stop += 2 * OCTAVE

    tie = tl.cast(0, tl.int32)
    # With so many keys the list would overflow: the guess lacks too many bits, or one key is very common.
    # Then the exact keys are worth their time, and where the ties are the many, what is above them is listed.
    room = tl.cast(capacity, tl.int64) * sampled
    if _reach(b_key, guess).to(tl.int64) * n > room:
        middle = _key_of_rank(b_key, expected, middle, middle + MIDDLE_WIDTH, 0)
        rank = tl.minimum(expected + _margin(b_key, middle), sampled)
        guess = _key_of_rank(b_key, rank, 0, middle + 1, 0)
        # Infinities must be listed, for what is not stays in err.
        if (_reach(b_key, guess).to(tl.int64) * n > room) & (guess < INFINITY):
            guess += 1
            tie = guess
    if guess == 0:  # zeros are never listed
        guess += 1
        tie = guess
    _store(p_control, guess, middle + MIDDLE_WIDTH // 2, tie, stop)


@triton.jit
def bracket_by_hint(p_control, hint):
    """From the last step's threshold: this step's is probably a little above or below."""
    scaled = hint.to(tl.float32, bitcast=True) * HINT_SLACK
    guess = tl.maximum(tl.minimum(magnitude_key(scaled), INFINITY), 1)
    _store(p_control, guess, hint, tl.cast(0, tl.int32), guess + OCTAVE // 8)


@triton.jit(do_not_specialize=["n", "lines", "stride", "capacity", "words"])
def guess_kernel(
    p_grad,
    p_err,
    p_control,
    p_hint,
    n,
    lines,
    stride,
    density,
    capacity,
    words,
    decay,
    p_clip,
    HINT: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """One program: clears the control block, which has `words` words, and says where to look."""
    hint = hinted(p_hint, HINT)
    if hint > 0:
        _clear(p_control, words)
        bracket_by_hint(p_control, hint)
    else:
        bracket_by_sample(
            *(p_grad, p_err, p_control, n, lines, stride, density, capacity, decay, p_clip, words),
            *(LINES, LINE, RESIDUAL),
        )
