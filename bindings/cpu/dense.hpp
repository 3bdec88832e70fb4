// How large dense results are written.
#pragma once

#include <algorithm>

#include "cpu/copy.hpp"
#include "cpu/isa/leaves.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace gck {

// Of a result that is written without being read: whether past the caches, which takes aligned vectors of 16.
inline bool goes_past_caches(const float* out, int64_t numel, int threads) {
  return is_past_caches(numel, threads) && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Calls decode(begin, end) of chunks [begin, end) on every thread, when `into` says how they are written.
template <typename Decode>
void decode_dense(DecodeInto& into, int64_t chunk_size, int threads, Decode decode) {
  const bool written = into.clear || !into.add;
  // Unlike zeros with a few entries, and copies, what is made of codes gains nothing below that by one
  // thread.
  into.past_caches = written && goes_past_caches(into.out, into.numel, 2);
  const int parts = parts_for(into.numel, threads);
  const int64_t chunks = (into.numel + chunk_size - 1) / chunk_size;
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(chunks, parts, t, 1);
    if (written) populate_fresh(into.out, begin * chunk_size, std::min(end * chunk_size, into.numel));
    decode(begin, end);
  });
}

}  // namespace gck
