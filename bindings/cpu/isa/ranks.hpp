// The k-th largest of entries in a cache, without a branch that they decide.
#pragma once

#include "cpu/isa/keys.hpp"

namespace gck::GCK_ISA {

// Each is counted against all others.
inline int32_t kth_of_fewest(const float* x, int64_t count, int64_t rank) {
  // Of the compiler's own vectors, which it cuts to what there is.
  typedef int32_t Keys __attribute__((vector_size(64)));
  constexpr int64_t kKeys = sizeof(Keys) / sizeof(int32_t);
  alignas(64) int32_t keys[kFewest];
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(x[i]);
  for (int64_t i = count; i % kKeys; ++i) keys[i] = -1;  // below all
  Keys best = Keys{} - 1;
  for (int64_t i = 0; i < count; i += kKeys) {
    Keys mine, reach{};
    std::memcpy(&mine, keys + i, sizeof mine);
    for (int64_t j = 0; j < count; ++j) reach -= keys[j] >= mine;
    const Keys fit = (reach >= static_cast<int32_t>(rank)) & (mine > best);
    best = (mine & fit) | (best & ~fit);
  }
  int32_t kth = best[0];
  for (int64_t lane = 1; lane < kKeys; ++lane) kth = best[lane] > kth ? best[lane] : kth;
  return kth;
}

// Halves the interval of keys until at most `slack` more than `rank` entries reach its low end.
inline int32_t bisected(const float* x, int64_t count, int64_t rank, int64_t slack) {
  int32_t high = 0;  // the largest key, and one more: fewer than `rank` reach it
  for (int64_t i = 0; i < count; ++i) high = key_of(x[i]) > high ? key_of(x[i]) : high;
  int32_t low = 0;
  ++high;
  for (int64_t reaching = count; reaching > rank + slack && high - low > 1;) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t here = count_reaching(x, count, middle);
    low = here >= rank ? middle : low;
    high = here >= rank ? high : middle;
    reaching = here >= rank ? here : reaching;
  }
  if (slack > 0) return low;
  int32_t kth = high - 1;  // the least that reaches it
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = key_of(x[i]);
    kth = key >= low && key < kth ? key : kth;
  }
  return kth;
}

}  // namespace gck::GCK_ISA
