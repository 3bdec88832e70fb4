// Copying what is too large to stay in the caches.
#pragma once

#include <cstdint>

namespace gck {

// to[0, nbytes) = from[0, nbytes), which do not overlap. Large copies are written past the caches, so that
// what is overwritten is not read first.
void copy_large(void* to, const void* from, int64_t nbytes, int threads);

}  // namespace gck
