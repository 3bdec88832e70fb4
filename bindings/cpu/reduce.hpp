// Packed payloads to the packed payload of their sum, tile by tile: no dense vector is written or read.
#pragma once

#include <functional>

#include "cpu/types.hpp"

namespace gck {

struct Reduce {
  int64_t numel, chunk_size;
  float divisor;  // of the sum
  float* err;     // residual of the sum, or null: none
  int threads;
};

// Chunks [begin, end) of a vector of which `sum` points to where its first element would lie.
using SumChunks = std::function<void(float* sum, int64_t begin, int64_t end)>;
// The same, and of its residual; on thread `part`. Returns the number of residuals cleared.
using CompressChunks =
    std::function<int64_t(int part, const float* sum, float* err, int64_t begin, int64_t end)>;

// For every tile: the sum of all ranks, divided, and compressed. All memory is allocated before the first
// write, so that std::bad_alloc leaves err as it was. Returns the number of residuals cleared.
int64_t reduce_tiles(const Reduce& job, const SumChunks& sum, const CompressChunks& compress);

}  // namespace gck
