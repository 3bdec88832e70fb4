// A chunk on its way to codes.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

// One chunk that is whole in memory, and where its packed codes and scales go.
struct Chunk {
  const void* grad;
  int64_t width;  // of an element of grad; 0: there is none
  int64_t at;     // of its first element, in grad
  int64_t first;  // the same, in the vector
  float* err;
  int64_t size, valid;  // elements from `valid` on are zeros
  char* codes;
  float* scales;
};

// Asks for what the chunk after the next one has in the place of elements [i, i + 16): while codes are made
// of what the nearest cache has, the hardware looks no further ahead.
class Later {
 public:
  explicit Later(const Chunk& c)
      : grad_(static_cast<const char*>(c.grad) + (c.at + 2 * c.size) * c.width),
        err_(c.err + 2 * c.size),
        width_(c.width) {}
  void ask(int64_t i) const {
    if (!width_) return;
    __builtin_prefetch(grad_ + i * width_, 0, 2);
    __builtin_prefetch(err_ + i, 1, 2);
  }

 private:
  const char* grad_;
  float* err_;
  int64_t width_;
};

}  // namespace gck::GCK_ISA
