// Scratch memory that outlives a call: giving pages to the system and asking for them again, zeroed,
// would cost more than the selection that they are for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace gck {

// A run of memory that is mapped but not touched: pages come as they are written to. The process keeps up to
// eight runs between calls, for threads that call at the same time, with at most kKept bytes of pages each.
class Scratch {
 public:
  struct Run {
    void* start;
    size_t bytes, touched;  // beyond `touched` there are no pages
  };

  // Throws std::bad_alloc where there is no address space left.
  explicit Scratch(size_t bytes);
  // Keeps the run for a next call, but gives back pages beyond kKept bytes: those at the ends of regions.
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `bytes` of the run, at a page of their own. All regions together: the constructor's bytes,
  // each rounded up by `padded`.
  void* region(size_t bytes);

  // To whole pages of the system: 4 KiB, and up to 64 KiB on some ARM.
  static size_t padded(size_t bytes);

  static constexpr size_t kKept = size_t{160} << 20;  // what 10 % of 100M entries need between calls

 private:
  Run run_;
  size_t used_ = 0;
  std::vector<std::pair<size_t, size_t>> regions_;  // offset, bytes
};

// Has the system put pages behind [start, start + bytes) at once, where it can and there is none in the
// middle yet: a large result may come fresh from it, and one page fault after the other would take longer
// than the writing.
void populate(void* start, size_t bytes);

// The same for out[begin, end), which will be written whole, if it is large, in large pages.
void populate_fresh(float* out, int64_t begin, int64_t end);

// The same for a part of a payload, if it is large, in pages of the usual size: where memory is in pieces, to
// find large ones takes longer than they save.
void populate_fresh_codes(char* start, size_t bytes);

}  // namespace gck
