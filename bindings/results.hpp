// Memory of results: what has been freed is kept for the next one. A large result fresh from the system costs
// a page fault, and zeroing, for each of its pages, which takes as long as a third of a selection.
#pragma once

#include <cstddef>

namespace gck {

struct ResultMemory {
  void* data;
  size_t capacity;  // bytes
};

// At least `bytes` bytes, aligned to 64 bytes, of any content. Throws std::bad_alloc.
ResultMemory take_result(size_t bytes);

// Keeps large memory for `take_result`: the newest of what was given back, kKeptResults bytes at most.
void give_result(const ResultMemory& memory) noexcept;

// Gives all that is kept back to the system.
void drop_results() noexcept;

constexpr size_t kLargeResult = size_t{1} << 17;    // from here on the C library asks the system each time
constexpr size_t kKeptResults = size_t{256} << 20;  // two of 10 % of 100M entries: one is made as one is held

}  // namespace gck
