"""Random numbers that are a function of a key and an element's index, so that no order of work shows.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

FACTOR_0 = tl.constexpr(0xD2511F53)
FACTOR_1 = tl.constexpr(0xCD9E8D57)
KEY_STEP_0 = tl.constexpr(0x9E3779B9)
KEY_STEP_1 = tl.constexpr(0xBB67AE85)


def key_of(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a 64-bit seed, each as an int32, whatever the seed is."""
    words = ((seed >> place & 0xFFFFFFFF) for place in (0, 32))
    low, high = (word - (word >> 31 << 32) for word in words)
    return low, high


def words_of(seed: int, counter: int) -> tuple[int, int, int, int]:
    """The four words that `philox` makes of one counter, on the host."""
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    x_0, x_1, x_2, x_3 = counter & 0xFFFFFFFF, counter >> 32, 0, 0
    for _ in range(10):
        p_0, p_2 = x_0 * FACTOR_0.value, x_2 * FACTOR_1.value
        x_0, x_1, x_2, x_3 = (
            p_2 >> 32 ^ x_1 ^ key_0,
            p_2 & 0xFFFFFFFF,
            p_0 >> 32 ^ x_3 ^ key_1,
            p_0 & 0xFFFFFFFF,
        )
        key_0, key_1 = key_0 + KEY_STEP_0.value & 0xFFFFFFFF, key_1 + KEY_STEP_1.value & 0xFFFFFFFF
    return x_0, x_1, x_2, x_3


@triton.jit
def philox(b_counter, key_0, key_1):
    """The four uint32 words of Philox4x32-10 for the int64 counters b_counter."""
    x_0 = b_counter.to(tl.uint32)
    x_1 = (b_counter >> 32).to(tl.uint32)
    x_2 = tl.zeros_like(x_0)
    x_3 = tl.zeros_like(x_0)
    key_0 = tl.cast(key_0, tl.int32).to(tl.uint32, bitcast=True)
    key_1 = tl.cast(key_1, tl.int32).to(tl.uint32, bitcast=True)
    factor_0 = tl.full((1,), FACTOR_0, tl.uint32)
    factor_1 = tl.full((1,), FACTOR_1, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(x_0, factor_0)
        high_2 = tl.umulhi(x_2, factor_1)
        low_0 = x_0 * factor_0
        low_2 = x_2 * factor_1
        x_0 = high_2 ^ x_1 ^ key_0
        x_1 = low_2
        x_2 = high_0 ^ x_3 ^ key_1
        x_3 = low_0
        key_0 += KEY_STEP_0
        key_1 += KEY_STEP_1
    return x_0, x_1, x_2, x_3


@triton.jit
def uniform(first, key_0, key_1, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) fp32, multiples of 2**-24 in [0, 1), of the elements from index `first`, int64, on.

    `first` is a multiple of 32. Each 64 elements share the sixteen words of four counters: the first sixteen
    have the upper bits of them, the next ones those of the words turned left by one byte, by two, by three.
    A thread has four elements that follow each other: they need all words of one counter.
    """
    b_four = first // 4 + tl.arange(0, ROWS * COLUMNS // 4)
    w_0, w_1, w_2, w_3 = philox(b_four // 16 * 4 + b_four % 4, key_0, key_1)
    b_word = tl.join(tl.join(w_0, w_2), tl.join(w_1, w_3))
    b_turn = (b_four // 4 % 4 * 8).to(tl.uint32)[:, None, None]
    b_word = b_word << b_turn | b_word >> (32 - b_turn & 31)
    b_word = tl.reshape(b_word, (ROWS, COLUMNS))
    return (b_word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
