"""Where the entries are: on the host and in kernels; see docs/kernels/random_k.md."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

from gck.kernels.common.philox import key_of, philox, words_of


class Ring(NamedTuple):
    """Where the entries are. The vector is a ring: element (p + rotation) mod numel is at position p.

    k strata are runs of positions, the first `longer` of size + 1 and the others of size elements; one
    entry is chosen in each. That of stratum `first` has the lowest index; the next strata follow.
    """

    numel: int
    k: int
    size: int
    longer: int
    rotation: int
    first: int
    key_0: int
    key_1: int

    @classmethod
    def of(cls, seed: int, numel: int, k: int) -> "Ring":
        size, longer = divmod(numel, k)
        rotation = number(seed, 2**64 - 2) * numel >> 64
        first = 0
        if rotation:
            # Where the vector starts, in the midst of the ring: that stratum has its entry before or behind.
            start, edge = numel - rotation, longer * (size + 1)
            cut = start // (size + 1) if start < edge else longer + (start - edge) // size
            offset = number(seed, cut) * (size + (cut < longer)) >> 64
            first = cut if cut * size + min(cut, longer) + offset >= start else cut + 1
        return cls(numel, k, size, longer, rotation, first, *key_of(seed))


RING = list(Ring._fields)  # as arguments of kernels; of any value, so that a seed compiles nothing


def number(seed: int, i: int) -> int:
    """The i-th random number of 64 bits."""
    words = words_of(seed, i // 2)
    return words[i % 2 * 2] | words[i % 2 * 2 + 1] << 32


@triton.jit
def widened(ring):
    """The ring with numbers of 64 bits, whatever those of a launch fit into."""
    numel, k, size, longer, rotation, first, key_0, key_1 = ring
    return (
        tl.cast(numel, tl.int64),
        tl.cast(k, tl.int64),
        tl.cast(size, tl.int64),
        tl.cast(longer, tl.int64),
        tl.cast(rotation, tl.int64),
        tl.cast(first, tl.int64),
        key_0,
        key_1,
    )


@triton.jit
def stratum_of(element, ring):
    """That of an element of the vector."""
    numel, _, size, longer, rotation, _, _, _ = ring
    position = tl.where(element < rotation, element - rotation + numel, element - rotation)
    edge = longer * (size + 1)
    return tl.where(position < edge, position // (size + 1), longer + (position - edge) // size)


@triton.jit
def rank_of(b_stratum, ring):
    """Of the strata's entries among all, in the order of the vector."""
    _, k, _, _, _, first, _, _ = ring
    return tl.where(b_stratum < first, b_stratum - first + k, b_stratum - first)


@triton.jit
def entry_of(b_stratum, ring):
    """The element that is chosen in each stratum."""
    numel, _, size, longer, rotation, _, key_0, key_1 = ring
    w_0, w_1, w_2, w_3 = philox(b_stratum >> 1, key_0, key_1)
    b_odd = (b_stratum & 1) != 0
    b_low = tl.where(b_odd, w_2, w_0).to(tl.uint64)
    b_high = tl.where(b_odd, w_3, w_1).to(tl.uint64)
    b_size = tl.where(b_stratum < longer, size + 1, size)
    b_offset = tl.umulhi((b_high << 32) | b_low, b_size.to(tl.uint64)).to(tl.int64)
    b_element = b_stratum * size + tl.minimum(b_stratum, longer) + b_offset + rotation
    return tl.where(b_element >= numel, b_element - numel, b_element)


@triton.jit
def strata_of(base, ring, TILE: tl.constexpr):
    """(the first stratum with elements in the tile from `base` on, how many have)."""
    numel, k, _, _, rotation, _, _, _ = ring
    stop = tl.minimum(base + TILE, numel)
    lowest = stratum_of(base, ring)
    strata = stratum_of(stop - 1, ring) - lowest + 1
    # Where the ring is closed, stratum 0 follows the last one.
    strata = tl.where((base < rotation) & (rotation < stop), strata + k, strata)
    return lowest, tl.minimum(strata, k)


@triton.jit
def entries_of(base, lowest, strata, start, ring, TILE: tl.constexpr, SLOTS: tl.constexpr):
    """(element, rank, whether it is in the tile from `base` on) of the entries chosen in some of the `strata`
    strata from `lowest` on: those numbered from `start` on."""
    numel, k, _, _, _, _, _, _ = ring
    b_slot = start + tl.arange(0, SLOTS)
    b_stratum = lowest + b_slot
    b_stratum = tl.where(b_stratum >= k, b_stratum - k, b_stratum)
    b_element = entry_of(b_stratum, ring)
    b_here = (b_slot < strata) & (b_element >= base) & (b_element < tl.minimum(base + TILE, numel))
    return b_element, rank_of(b_stratum, ring), b_here
