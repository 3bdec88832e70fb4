"""The control block of a GPU top-k: every decision of a call, taken on the device and kept there.

The stream moves acc = grad + err into err, and what reaches a guessed key into a list. How the
winners are found follows from what it counted:

- LIST: the list holds them all, and some losers. In err is 0 where one is expected to win, and else acc, so
  that few places of err are written again.
- KNOWN: too few were listed, but with the ties that were counted beside them they suffice: the tie's key is
  the threshold, and nothing needs to be refined.
- SCAN: the guess was too high, or the list overflowed. All of acc is read from err.

In the last two the list is first put back into err.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

# Digits of the 31-bit key as (lowest bit, bits). Histograms of more than 256 bins cost some versions of
# Triton more time than the pass that they would save.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))
BINS = 256

# Words of the control block, int64, all zero before the first kernel.
GUESS = tl.constexpr(0)  # the stream lists the keys from this one on; at least 1
TIE = tl.constexpr(1)  # the key that the stream counts, plus 1; 0: none
# Keys that reached the guess; more than the list's capacity: it overflowed. Where one word can count both,
# its high half counts the ties, or, where there is no tie to count, what lies in the bracket, which then has
# a list of its own.
LISTED = tl.constexpr(2)
TIES = tl.constexpr(3)  # where one word is too short for both
# A (key prefix, winners still to find among the keys that begin with it) pair after each digit; the last
# one is the k-th key itself and the number of its ties that win.
DECISIONS = tl.constexpr(4)
THRESHOLD = tl.constexpr(DECISIONS.value + 2 * (len(DIGITS) - 1))
QUOTA = tl.constexpr(THRESHOLD.value + 1)
BRACKET_STOP = tl.constexpr(12)  # the k-th key is probably one from the guess up to, but not, this one
BRACKET_BITS = tl.constexpr(13)  # how many bits tell these keys apart
NONFINITE = tl.constexpr(14)  # counts what nobody asked for
NEAR = tl.constexpr(15)  # keys set apart because the threshold is one of them
ARRIVED = tl.constexpr(16)  # programs that are done with their part
PASSED = tl.constexpr(17)  # programs that came to a barrier, each of them counted every time
EXPECTED = tl.constexpr(18)  # about the k-th key: what reaches it probably wins; at least the guess
SAMPLED = tl.constexpr(19)  # programs of the guess that are done with their part
SQUARES = tl.constexpr(20)  # of the sample's hits a line; and, above them, the hits, and the keys offered
OVERFLOWN = tl.constexpr(21)  # programs of the guess that have more to offer than there is room for
ZEROS = tl.constexpr(22)  # programs of the guess that offer all they have but zeros
CLUSTERED = tl.constexpr(23)  # whether some tiles may have many times the candidates of others
LONG_TILES = tl.constexpr(24)  # how many have so many that programs share them out anew
HISTOGRAMS = tl.constexpr(26)
LEVELS = 5  # of the search in a single vector: the bracket, and all keys in as many steps as there are digits
WORDS = HISTOGRAMS.value + LEVELS * BINS

LAST_KEY = tl.constexpr(0x7FFFFFFF)  # past any key
HALF = tl.constexpr(32)  # bits of a word with two counts
HALF_MASK = tl.constexpr(0xFFFFFFFF)
MOST_IN_HALF = (1 << 31) - (1 << 16)  # elements that are fewer can be counted in either half, with padding

SCAN = tl.constexpr(0)
LIST = tl.constexpr(1)
KNOWN = tl.constexpr(2)


@triton.jit
def arrive(p_arrived):
    """Whether this program is the last one to come here. What the others wrote before is there then."""
    tl.debug_barrier()
    arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == tl.num_programs(0) - 1


@triton.jit
def counted(p_control, BRACKET: tl.constexpr):
    """(how many keys reached the guess, how many are ties, how many lie in the bracket's own list, which is
    empty where there is a tie to count), once the stream has ended.

    Where zeros are tied, what the last tile lacks is counted with them. That changes nothing: whatever is not
    listed is a zero then, and there are more than enough.
    """
    listed = tl.load(p_control + LISTED)
    if BRACKET:
        other = listed >> HALF
        tied = tl.load(p_control + TIE) > 0
        return listed & HALF_MASK, tl.where(tied, other, 0), tl.where(tied, 0, other)
    else:
        return listed, tl.load(p_control + TIES), tl.cast(0, tl.int64)


@triton.jit
def mode_by(listed, ties, k, capacity):
    """LIST, KNOWN or SCAN."""
    short = tl.where(listed + ties >= k, KNOWN, SCAN)
    return tl.where(listed < k, short, tl.where(listed <= capacity, LIST, SCAN))


@triton.jit
def decide(p_control, k, digit, shift, BINS: tl.constexpr):
    """(prefix, winners still to find) that the counts of a digit, from bit `shift` on, imply.

    Each program that needs a decision takes it by itself: that costs one small load, and spares both a
    launch and a ticket. One of them must `note` it for the next digit. Loads are from the L2 cache: other
    programs of the same kernel may have stored.
    """
    prefix = tl.cast(0, tl.int64)
    wanted = tl.cast(k, tl.int64)
    if digit > 0:
        prefix = tl.load(p_control + DECISIONS + 2 * (digit - 1), cache_modifier=".cg")
        wanted = tl.load(p_control + DECISIONS + 2 * (digit - 1) + 1, cache_modifier=".cg")
    b_bin = tl.arange(0, BINS)
    b_count = tl.load(p_control + HISTOGRAMS + digit * BINS + b_bin, cache_modifier=".cg")
    b_at_least = tl.cumsum(b_count, 0, reverse=True)
    bin = tl.sum((b_at_least >= wanted).to(tl.int32), 0) - 1
    prefix |= bin.to(tl.int64) << shift
    wanted -= tl.sum(tl.where(b_bin > bin, b_count, 0), 0)
    return prefix.to(tl.int32), wanted


@triton.jit
def note(p_control, prefix, wanted, digit):
    tl.store(p_control + DECISIONS + 2 * digit, prefix.to(tl.int64))
    tl.store(p_control + DECISIONS + 2 * digit + 1, wanted)


@triton.jit
def last_decision(p_control, k, mode, digit, shift, BINS: tl.constexpr):
    """(the k-th key, how many of its ties win)"""
    if mode == KNOWN:
        threshold = tl.load(p_control + TIE).to(tl.int32) - 1
        quota = k - tl.load(p_control + LISTED)
    else:
        threshold, quota = decide(p_control, k, digit, shift, BINS)
    return threshold, quota
