// Copying what is too large to stay in the caches.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gck {

// Whether so many entries of 4 bytes are written past the caches: they would not stay there, and writing
// through the caches reads first what is overwritten. One thread, which waits for what it reads, gains by
// that from 4 MB on even where the result is read next; two, which share the memory's bandwidth, from 8 MB
// on.
inline bool is_past_caches(int64_t numel, int threads) {
  return numel >= int64_t{1 << 20} * std::clamp(threads, 1, 2);
}

// to[0, nbytes) = from[0, nbytes), which do not overlap. Large copies are written past the caches, so that
// what is overwritten is not read first.
void copy_large(void* to, const void* from, int64_t nbytes, int threads);

}  // namespace gck
