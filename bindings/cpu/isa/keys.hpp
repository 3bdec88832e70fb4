// Entries by their keys: where those are that a threshold is reached by, how many, and what is not finite.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// Appends base + the position of each bit; there is room for 3 more. Four at a time without a branch: fewer
// than two are usual.
inline uint32_t* put_positions(uint64_t bits, int64_t base, uint32_t* out) {
  uint32_t* const end = out + __builtin_popcountll(bits);
  do {
    for (int j = 0; j < 4; ++j) {
      *out++ = static_cast<uint32_t>(base) + lowest_bit(bits);
      bits &= bits - 1;
    }
  } while (bits);
  return end;
}

// How many of `count` entries, behind which there is room for a vector, have key >= threshold > 0.
inline int64_t count_reaching(const float* x, int64_t count, int32_t threshold) {
  int64_t reaching = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) reaching += __builtin_popcount(key_ge(load(x + i), threshold));
  if (i < count) reaching += __builtin_popcount(key_ge(load(x + i), threshold) & ((1u << (count - i)) - 1));
  return reaching;
}

// What is not finite becomes 0; returns how many that were.
inline int64_t clear_nonfinite(float* x, int64_t count) {
  int64_t cleared = 0, i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    if (!any_key_ge(a, b, kInfKey)) continue;
    const auto in_a = key_ge(a, kInfKey), in_b = key_ge(b, kInfKey);
    store(x + i, select(in_a, set1(0.0f), a));
    store(x + i + kLanes, select(in_b, set1(0.0f), b));
    cleared += __builtin_popcount(in_a) + __builtin_popcount(in_b);
  }
  for (; i < count; ++i) {
    if (key_of(x[i]) < kInfKey) continue;
    x[i] = 0.0f;
    ++cleared;
  }
  return cleared;
}

}  // namespace gck::GCK_ISA
