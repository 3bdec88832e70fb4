"""Where the key of the k-th largest element probably lies, from a sample.

The sample is made of lines, runs of 16 elements at hashed places, so that no period of a gradient aligns with
them. The bracket begins at the guess, the sample's key of rank f + 5 sqrt(sum of squared hits a line) + 8,
where f is the expected rank of the k-th key and a hit a key of at least that rank: the squares measure how
clustered the large elements are. It ends 3 sqrt(...) ranks on the other side, or later, where the bits that
its keys differ in reach further. To miss the k-th key there costs some levels of the search, which is rare.

Each program looks at a part of the sample, and offers its largest keys. The last one to arrive finds the
bracket from what all of them offered, or, where one has too many to offer because they are too close to be
told apart, from its own part alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from gck.kernels.common.keys import INFINITY, accumulate, magnitude_key
from gck.kernels.common.residual import read_residual
from gck.kernels.topk.gpu_control import (
    BRACKET_BITS,
    BRACKET_STOP,
    CLUSTERED,
    EXPECTED,
    GUESS,
    OVERFLOWN,
    SAMPLED,
    SQUARES,
    TIE,
    ZEROS,
    arrive,
)
from gck.kernels.topk.gpu_guess import (
    HINT_SLACK,
    LINE,
    hinted,
    margin_of,
    place_of_line,
    sample_lines,
)
from gck.kernels.topk.gpu_search import key_of_rank, keys_of_ranks, low_end, reach, reach_both

LINES = 256  # of a program; a power of two
MOST_PARTS = 32  # programs
CANDIDATES = 8192  # keys that the last of them has room for; a power of two
FEWEST_OFFERED = 64  # keys a program
BRACKET_WARPS = 8
BRACKET_REGISTERS = 168  # of few programs, which have a processor each
CUTOFF_BITS = tl.constexpr(16)  # that the least key offered may lack: 1/128 octave
OCTAVE = tl.constexpr(1 << 23)  # of keys: from x to 2x
MIDDLE_BITS = tl.constexpr(18)  # that the expected key may lack: what follows only counts from there on
MIDDLE_WIDTH = tl.constexpr(1 << MIDDLE_BITS.value)
GUESS_BITS = tl.constexpr(15)  # that the guess may lack: 1/256 octave
GUESS_WIDTH = tl.constexpr(1 << GUESS_BITS.value)
# Three sums over all parts in one word: of squared hits, 2^21 at most, of hits, and of keys offered.
HITS_AT = tl.constexpr(24)
KEYS_AT = tl.constexpr(44)
SQUARES_MASK = tl.constexpr((1 << 24) - 1)
HITS_MASK = tl.constexpr((1 << 20) - 1)
CLUSTERS = tl.constexpr(2.0)  # times as many squared hits as by chance
SURE = tl.constexpr(12)  # ranks: that fewer are found than one in so many expected hardly happens


def sample_shape(n: int, k: int, lines: int, candidates: int) -> tuple[int, int, int]:
    """(lines of the sample, keys that a program of `lines` of them may offer, room for those of all), the
    last two powers of two. Three quarters of what it may offer are its largest keys; the rest is for keys
    close to the last of them. So many reach the guess of all parts together at the worst, where all hits of a
    line come together, in a part that has five standard deviations more than its share."""
    size = triton.next_power_of_2(lines * LINE)
    expected = k / n * lines * LINE
    share = min(FEWEST_OFFERED, size)
    while True:
        drawn = sample_lines(n, max(min(candidates // share, MOST_PARTS), 1) * lines)
        parts = triton.cdiv(drawn, lines)
        margin = 5 * ((LINE * expected * parts) ** 0.5 + 1) + 8
        if share == size or share // 4 * 3 >= expected + 5 * expected**0.5 + margin / parts:
            break
        share *= 2
    return drawn, int(share), int(max(share * triton.next_power_of_2(parts), LINE))


@triton.jit
def _squares(b_key, middle):
    """(how many keys are at least `middle`; their squared numbers a line, summed)"""
    tl.static_assert(b_key.shape[0] * b_key.shape[1] <= 2**12)
    b_hits = tl.sum(tl.where(b_key >= middle, 1, 0), 1)
    both = tl.sum((b_hits << 18) + b_hits * b_hits, 0)  # squares need no more bits, if a line has 16 keys
    return both >> 18, both & 0x3FFFF


@triton.jit
def _expected(density, sampled):
    """The rank of the k-th key in a sample of so many."""
    return (density * sampled.to(tl.float32)).to(tl.int32) + 1


@triton.jit
def _offer(p_candidates, b_key, cutoff, SHARE: tl.constexpr):
    """Stores the keys from `cutoff` on, and -1 for what is left of the share; returns how many they are."""
    SIZE: tl.constexpr = b_key.shape[0] * b_key.shape[1]
    b_key = tl.reshape(b_key, (SIZE,))
    b_hit = (b_key >= cutoff).to(tl.int32)
    b_slot = tl.cumsum(b_hit, 0) - b_hit
    count = tl.sum(b_hit, 0)
    tl.store(p_candidates + b_slot, b_key, mask=(b_hit > 0) & (b_slot < SHARE))
    b_free = tl.arange(0, SHARE)
    tl.store(p_candidates + b_free, tl.full((SHARE,), -1, tl.int32), mask=b_free >= count)
    return count


@triton.jit
def _store(p_control, guess, expected, tie, stop):
    stop = tl.minimum(tl.maximum(stop, guess + 1), INFINITY)
    bits = tl.cast(0, tl.int32)
    while (stop - guess - 1) >> bits > 0:
        bits += 1
    tl.store(p_control + GUESS, tl.minimum(guess, INFINITY).to(tl.int64))
    tl.store(p_control + EXPECTED, tl.minimum(tl.maximum(guess, expected), INFINITY).to(tl.int64))
    tl.store(p_control + TIE, tie.to(tl.int64))
    tl.store(p_control + BRACKET_STOP, stop.to(tl.int64))
    tl.store(p_control + BRACKET_BITS, bits.to(tl.int64))


@triton.jit
def _bracket(b_key, p_control, n, capacity, expected, middle, hits, squares, stop, sampled, keys, zeros):
    """Decides on the bracket by so many keys, which are all of `sampled` ones that reach the guess, or more.

    `squares` are those of so many `hits`, line by line; `stop` is past the largest, `middle` roughly the key
    of rank `expected`; `zeros`: zeros are missing.
    """
    margin = margin_of(squares)
    # Past all keys that there are, the others are zeros, or there was no room for them.
    most = tl.where(zeros, sampled, keys)
    rank = tl.minimum(expected + margin, most)
    # Of few expected keys none is surely among the winners: the bracket ends after the sample's largest.
    upper = (margin - 8) // 5 * 3
    last = tl.where(expected > upper, expected - upper, 1)
    low = tl.maximum(middle - OCTAVE // 4, 0) >> GUESS_BITS << GUESS_BITS
    high = tl.minimum(middle + OCTAVE // 4, stop)
    below, above = reach_both(b_key, low, high)
    low = tl.where(below >= rank, low, 0)
    reached = tl.where(below >= rank, below, keys)
    high = tl.where(above < last, high, stop)
    guess, reached, last_key = keys_of_ranks(
        b_key, rank, low, middle + MIDDLE_WIDTH, reached, last, middle, high, GUESS_BITS
    )
    about = middle + MIDDLE_WIDTH // 2
    if expected > upper:
        stop = last_key + GUESS_WIDTH
        about = guess + (stop - guess) // 8 * 5  # five deviations from the one, three from the other
    elif expected < SURE:
        stop = tl.minimum(stop, INFINITY - 2 * OCTAVE) + 2 * OCTAVE

    tie = tl.cast(0, tl.int32)
    # With so many keys the list would overflow: the guess lacks too many bits, or one key is very common.
    # Then the exact keys are worth their time, and where the ties are the many, what is above them is listed.
    room = tl.cast(capacity, tl.int64) * sampled
    if reached.to(tl.int64) * n > room:
        middle = key_of_rank(b_key, expected, middle, middle + MIDDLE_WIDTH, 0)
        about = middle
        guess = key_of_rank(b_key, rank, 0, middle + 1, 0)
        # Infinities must be listed, for what is not stays in err.
        if (reach(b_key, guess).to(tl.int64) * n > room) & (guess < INFINITY):
            guess += 1
            tie = guess
    if guess == 0:  # zeros are never listed
        guess += 1
        tie = guess
    # More squares than as many hits would have that know nothing of each other: 1 + 15 densities for each.
    chance = hits.to(tl.float32) * (sampled + 15.0 * expected)
    if squares.to(tl.float32) * sampled > CLUSTERS * chance:
        tl.store(p_control + CLUSTERED, 1)
    _store(p_control, guess, about, tie, stop)


@triton.jit
def _middle(b_key, expected):
    """(the key of rank `expected`, but for its lowest bits; what is past the largest)"""
    stop = tl.max(tl.max(b_key, 1), 0) + 1
    low = low_end(b_key, expected, stop - 8 * OCTAVE)
    return key_of_rank(b_key, expected, low, stop, MIDDLE_BITS), stop


@triton.jit
def _middle_near(b_key, expected, near, stop):
    """The key of rank `expected`, but for its lowest bits, which is probably close to `near`."""
    low = tl.maximum(near - OCTAVE // 8, 0)
    high = tl.minimum(near + OCTAVE // 8, stop)
    below, above = reach_both(b_key, low, high)
    low = tl.where(below >= expected, low, 0)
    low = tl.where(above >= expected, high, low)
    high = tl.where(above >= expected, stop, tl.where(below >= expected, high, near))
    return key_of_rank(b_key, expected, low, high, MIDDLE_BITS)


@triton.jit
def bracket_by_sample(
    p_grad,
    p_err,
    p_control,
    p_candidates,
    n,
    lines,
    stride,
    density,
    capacity,
    decay,
    p_clip,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    SHARE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    b_line = part + tl.arange(0, LINES) * parts  # each part is spread over all of the vector
    b_element = tl.arange(0, LINE)[None, :]
    b_at = (place_of_line(b_line, stride) * LINE)[:, None] + b_element
    b_inside = (b_line < lines)[:, None]
    b_grad = tl.load(p_grad + b_at, mask=b_inside, other=0.0)
    b_err = read_residual(tl.load(p_err + b_at, mask=b_inside, other=0.0), decay, p_clip, RESIDUAL)
    b_key = tl.where(b_inside, magnitude_key(accumulate(b_grad, b_err)), -1)

    own = tl.cdiv(lines - part, parts) * LINE
    expected = _expected(density, own)
    middle, stop = _middle(b_key, expected)
    hits, squares = _squares(b_key, middle)
    if hits > 2 * expected:  # keys so close that they need all their bits
        middle = key_of_rank(b_key, expected, middle, middle + MIDDLE_WIDTH, 0)
        hits, squares = _squares(b_key, middle)
    alone = parts == 1
    decides = alone
    if parts > 1:
        rank = tl.where(own <= SHARE, own, SHARE // 4 * 3)
        low = low_end(b_key, rank, middle - OCTAVE // 2)
        high = tl.where(rank > expected, middle + MIDDLE_WIDTH, stop)
        cutoff = key_of_rank(b_key, rank, low, high, CUTOFF_BITS)
        # Zeros are not: where most keys are, they would leave no room.
        offered = _offer(p_candidates + part * SHARE, b_key, tl.maximum(cutoff, 1), SHARE)
        if offered > SHARE:
            tl.atomic_add(p_control + OVERFLOWN, 1, sem="relaxed")
        if cutoff == 0:
            tl.atomic_add(p_control + ZEROS, 1, sem="relaxed")
        sums = (offered.to(tl.int64) << KEYS_AT) | (hits.to(tl.int64) << HITS_AT) | squares
        tl.atomic_add(p_control + SQUARES, sums, sem="relaxed")
        decides = arrive(p_control + SAMPLED)
        alone = tl.load(p_control + OVERFLOWN, cache_modifier=".cg") > 0
    if decides & alone:
        of_part = (hits, squares, stop, own, own, False)
        _bracket(b_key, p_control, n, capacity, expected, middle, *of_part)
    elif decides:
        b_slot = tl.arange(0, CANDIDATES // LINE)[:, None] * LINE + b_element
        b_offered = tl.load(
            p_candidates + b_slot, mask=b_slot < parts * SHARE, other=-1, cache_modifier=".cg"
        )
        sums = tl.load(p_control + SQUARES, cache_modifier=".cg")
        all_squares = (sums & SQUARES_MASK).to(tl.int32)
        all_hits = ((sums >> HITS_AT) & HITS_MASK).to(tl.int32)
        keys = (sums >> KEYS_AT).to(tl.int32)
        zeros = tl.load(p_control + ZEROS, cache_modifier=".cg") > 0
        sampled = lines * LINE
        expected = _expected(density, sampled)
        stop = tl.max(tl.max(b_offered, 1), 0) + 1
        middle = _middle_near(b_offered, expected, middle, stop)
        of_all = (all_hits, all_squares, stop, sampled, keys, zeros)
        _bracket(b_offered, p_control, n, capacity, expected, middle, *of_all)


@triton.jit
def bracket_by_hint(p_control, hint):
    """From the last step's threshold: this step's is probably a little above or below."""
    scaled = hint.to(tl.float32, bitcast=True) * HINT_SLACK
    guess = tl.maximum(tl.minimum(magnitude_key(scaled), INFINITY), 1)
    _store(p_control, guess, hint, tl.cast(0, tl.int32), guess + OCTAVE // 8)


@triton.jit(do_not_specialize=["n", "lines", "stride", "capacity"])
def guess_kernel(
    p_grad,
    p_err,
    p_control,
    p_candidates,
    p_hint,
    n,
    lines,
    stride,
    density,
    capacity,
    decay,
    p_clip,
    HINT: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    SHARE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Says in the control block, which is zero, where to look; LINES of the sample a program."""
    hint = hinted(p_hint, HINT)
    if hint > 0:
        if tl.program_id(0) == 0:
            bracket_by_hint(p_control, hint)
    else:
        bracket_by_sample(
            *(p_grad, p_err, p_control, p_candidates, n, lines, stride, density, capacity, decay, p_clip),
            *(LINES, LINE, SHARE, CANDIDATES, RESIDUAL),
        )
